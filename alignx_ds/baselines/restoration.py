"""Which weights of a model that has lost an axis are set back to those of one that has it.

The rule of Yang et al. 2025 (arXiv 2504.09757), as its published code has it: a weight is a candidate if the gradient
of the lost axis's loss has the sign of its displacement from the aligned model, so that going back lowers the loss; of
the candidates, those with the largest gradients are restored, a small share of all weights in a round.
"""

from __future__ import annotations

import torch
from torch import Tensor


def restorable(displacement: Tensor, gradient: Tensor, share: float) -> Tensor:
    """The weights to restore, [m, n] bool, at most this share of them.

    `displacement` [m, n] is the model minus the aligned model, `gradient` [m, n] the lost axis's loss's at the model.
    """
    size = torch.where(displacement * gradient > 0, gradient.abs(), 0.0).flatten()
    chosen = size.topk(max(1, round(share * size.numel()))).indices
    found = torch.zeros_like(size, dtype=torch.bool).index_fill(0, chosen, True) & (size > 0)
    return found.view_as(gradient)
