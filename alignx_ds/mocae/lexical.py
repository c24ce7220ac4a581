"""The lexical calibrator: a linear score of a prompt's tokens and token pairs, independent of the hidden states.

Ours, not the paper's: on real prompts it corrects the gate where a small model's features fall short (docs/results.md).
Shapes: B rows, T tokens, H buckets, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BUCKETS = 2**16  # H; the factors are odd, so the tokens of a vocabulary up to H don't collide
FACTOR, SECOND, SHIFT = 2654435761, 2654435769, 97


class Lexicon(nn.Module):
    """TF-IDF and a linear map: score = bias + Σ weights·tfidf, from buffers that `alignx_ds.routing.fit_lexicon` fits.

    tfidf is (1 + log count)·rarity, divided by its norm over the prompt, as scikit-learn's (sublinear_tf). The scores
    have a standard deviation of 1 on the calibration split.
    """

    rarity: Tensor  # [H] inverse document frequency
    weights: Tensor  # [E, H]
    bias: Tensor  # [E]

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.register_buffer("rarity", torch.zeros(BUCKETS, dtype=torch.float32))
        self.register_buffer("weights", torch.zeros(experts, BUCKETS, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32))

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask [B, T] int64, 1 on the prompt's tokens -> scores [B, E] fp32, without gradients."""
        scores: Tensor = self.shares(ids, mask).sum(-1).T + self.bias.float()
        return scores

    @torch.no_grad()
    def shares(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The share of each token, then of each pair of neighbours, in the scores: [B, T] -> [E, B, 2T − 1] fp32.

        The occurrences of a bucket share its value equally. The shares and the bias add up to the scores.
        """
        buckets, inside = ngrams(ids, mask.to(ids.device))
        times = _counts(buckets, inside).gather(1, buckets).clamp_min(1)  # count of each one's bucket
        worth = (1 + times.log()) * self.rarity.float()[buckets] * inside
        length = (worth.square() / times).sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
        shares: Tensor = self.weights.float()[:, buckets] * (worth / times / length)
        return shares


def ngrams(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The buckets int64 of all tokens, then of all pairs of neighbours, and 1 where they are within the mask, fp32.

    ids, mask [B, T] -> two of [B, 2T − 1].
    """
    inside = mask.bool()
    pairs = (ids[:, :-1] * FACTOR) ^ (ids[:, 1:] * SECOND + SHIFT)
    buckets = torch.cat([ids * FACTOR, pairs], dim=1) % BUCKETS
    return buckets, torch.cat([inside, inside[:, :-1] & inside[:, 1:]], dim=1).float()


def bucket_counts(ids: Tensor, mask: Tensor) -> Tensor:
    """How often each bucket occurs within the mask: ids, mask [B, T] -> [B, H] fp32."""
    return _counts(*ngrams(ids, mask))


def _counts(buckets: Tensor, inside: Tensor) -> Tensor:
    return inside.new_zeros(len(buckets), BUCKETS).scatter_add_(1, buckets, inside)
