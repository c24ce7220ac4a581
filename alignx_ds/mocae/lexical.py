"""The lexical calibrator: a linear score of a query's tokens and token pairs, which no hidden state need remember.

Ours, not the paper's: on real prompts it corrects the gate where a small model's features fall short
(docs/results.md). Shapes: B rows, T tokens, H buckets, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BUCKETS = 2**16  # that tokens and pairs are hashed into; an odd factor keeps every token of a smaller vocabulary apart
FACTOR, SECOND, SHIFT = 2654435761, 2654435769, 97


class Lexicon(nn.Module):
    """Scores [B, E] of prompts, standardised, from buffers that `alignx_ds.routing.fit_lexicon` fits."""

    rarity: Tensor  # [H] inverse document frequency
    weights: Tensor  # [E, H]
    bias: Tensor  # [E]

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.register_buffer("rarity", torch.zeros(BUCKETS))
        self.register_buffer("weights", torch.zeros(experts, BUCKETS))
        self.register_buffer("bias", torch.zeros(experts))

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, T], 1 on the tokens that count -> [B, E] fp32."""
        scores: Tensor = self.shares(ids, mask).sum(-1).T + self.bias.float()
        return scores

    @torch.no_grad()
    def shares(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What each token, and after them each pair of neighbours, brings to the scores: [B, T] -> [E, B, 2T − 1]."""
        buckets, inside = ngrams(ids, mask.to(ids.device))
        times = bucket_counts(ids, mask.to(ids.device)).gather(1, buckets).clamp_min(1)  # of each occurrence's bucket
        worth = (1 + times.log()) * self.rarity.float()[buckets] * inside  # all occurrences of a bucket share it
        length = (worth.square() / times).sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
        shares: Tensor = self.weights.float()[:, buckets] * (worth / times / length)
        return shares


def ngrams(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(bucket, 1 where it is of the prompt) of every token and every pair of neighbours: ids [B, T] -> [B, 2T − 1]."""
    inside = mask.bool()
    pairs = (ids[:, :-1] * FACTOR) ^ (ids[:, 1:] * SECOND + SHIFT)
    buckets = torch.cat([ids * FACTOR, pairs], dim=1) % BUCKETS
    return buckets, torch.cat([inside, inside[:, :-1] & inside[:, 1:]], dim=1).float()


def bucket_counts(ids: Tensor, mask: Tensor) -> Tensor:
    """How often each bucket occurs in a prompt: ids, mask [B, T] -> [B, H] fp32."""
    buckets, inside = ngrams(ids, mask)
    return inside.new_zeros(len(ids), BUCKETS).scatter_add_(1, buckets, inside)
