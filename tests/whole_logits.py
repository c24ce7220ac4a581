"""The loss from the logits of all tokens, beside which training's own is tested: that one has the answers' alone."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from alignx_ds.data.batches import IGNORED


def answer_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed NLL (nats) of the tokens with a label: logits [B, T, V], labels [B, T] int64 -> fp32 scalar.

    The logits at a position predict the label of the next one; labels outside the answers are IGNORED.
    """
    wanted = labels[:, 1:].flatten()
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted, ignore_index=IGNORED, reduction="sum")
