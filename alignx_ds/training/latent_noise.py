"""Noise on the hidden states of one layer, as large as they are: the perturbation of ASA and LAPT.

Gu et al. 2025, Probing the Robustness of Large Language Models Safety to Latent Perturbations (arXiv 2506.16078): the
activation steering attack adds it while a model answers, layer-wise adversarial patch training while it learns. A state
h of d features becomes h + α δ, where z is Gaussian noise and δ has the mean and the standard deviation of h:

    δ = (z − mean z) / std z · std h + mean h

Shapes: B rows, T tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from alignx_ds.data.batches import IGNORED, MicroBatch
from alignx_ds.models.decoder_outputs import changed_output
from alignx_ds.training.losses import language_loss, model_inputs
from alignx_ds.training.metrics import MicroBatchLoss

LEAST_SPREAD = 1e-6  # of noise that is the same in every feature, as a gradient of zeros: only the mean is added


def matched(noise: Tensor, states: Tensor) -> Tensor:
    """δ: the noise with the mean and the standard deviation of each state, over its d features.

    `noise` and `states` are [..., d] and may broadcast; returns fp32.
    """
    z, h = noise.float(), states.float()
    unit = (z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True).clamp_min(LEAST_SPREAD)
    return unit * h.std(-1, keepdim=True) + h.mean(-1, keepdim=True)


def perturbed(
    layer: nn.Module, noise: Tensor | None, places: Tensor | None = None, strength: float = 1.0
) -> AbstractContextManager[None]:
    """Within it, the decoder layer adds α δ to its output, where `strength` is α; no gradient goes through δ.

    `noise` is z [B, 1, d], one for all tokens of a row; None draws one for each token and pass. `places` [B, T] bool
    are the tokens whose states are changed; None: the last token of every pass, the prompt's and each decoded one.
    """

    def change(hidden: Tensor) -> Tensor:
        last = torch.arange(hidden.shape[1], device=hidden.device) == hidden.shape[1] - 1
        chosen = (last if places is None else places).unsqueeze(-1)
        drawn = torch.randn_like(hidden, dtype=torch.float32) if noise is None else noise
        delta = strength * matched(drawn, hidden.detach()) * chosen
        # A sum keeps nothing for the backward pass, in which a recomputed layer runs without this.
        return hidden + delta.to(hidden)

    return changed_output(layer, change)


def before_answers(labels: Tensor) -> Tensor:
    """[B, T] bool: the tokens from which the next one, which has a label, is predicted."""
    return pad(labels[:, 1:] != IGNORED, (0, 1))


def noisy_language_loss(layers: Sequence[nn.Module], engine: Any, part: MicroBatch) -> MicroBatchLoss:
    """`language_loss` while one of these decoder layers, drawn for each micro batch, is perturbed before the answers.

    It draws from torch's generators, which are seeded per rank.
    """
    layer = layers[int(torch.randint(len(layers), ()))]
    read, _ = model_inputs(engine, part.batch)
    with perturbed(layer, None, before_answers(read.labels)):
        return language_loss(engine, part)
