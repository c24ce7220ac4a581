"""Noise on the hidden states of one layer, as large as they are: the perturbation of ASA and LAPT.

Gu et al. 2025, Probing the Robustness of Large Language Models Safety to Latent Perturbations (arXiv 2506.16078): the
activation steering attack adds it while a model answers, layer-wise adversarial patch training while it learns. A state
h of d features becomes h + α δ, where z is Gaussian noise and δ has the mean and the standard deviation of h:

    δ = (z − mean z) / std z · std h + mean h

Shapes: B rows, T tokens, d hidden size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from alignx_ds.data.batches import IGNORED
from alignx_ds.models.decoder_outputs import changed_output


def matched(noise: Tensor, states: Tensor) -> Tensor:
    """δ: the noise with the mean and the standard deviation of each state, over its d features.

    `noise` and `states` are [..., d] and may broadcast; returns fp32.
    """
    z, h = noise.float(), states.float()
    unit = (z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True)
    return unit * h.std(-1, keepdim=True) + h.mean(-1, keepdim=True)


def perturbed(
    layer: nn.Module, noise: Tensor, places: Tensor | None = None, strength: float = 1.0
) -> AbstractContextManager[None]:
    """Within it, the decoder layer adds α δ to its output, where `strength` is α; no gradient goes through δ.

    `noise` is z [B, 1, d], one for all tokens of a row. `places` [B, T] bool
    are the tokens whose states are changed; None: the last token of every pass, the prompt's and each decoded one.
    """

    def change(hidden: Tensor) -> Tensor:
        last = torch.arange(hidden.shape[1], device=hidden.device) == hidden.shape[1] - 1
        chosen = (last if places is None else places).unsqueeze(-1)
        delta = strength * matched(noise, hidden.detach())
        return torch.where(chosen, hidden + delta.to(hidden), hidden)

    return changed_output(layer, change)


def before_answers(labels: Tensor) -> Tensor:
    """[B, T] bool: the tokens from which the next one, which has a label, is predicted."""
    return pad(labels[:, 1:] != IGNORED, (0, 1))
