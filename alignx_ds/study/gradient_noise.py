"""The direction that raises the NLL of an answer most when it is added to the states of one layer.

ASA_grad of Gu et al. 2025 (arXiv 2506.16078): the noise z of a random attack becomes the sign of a gradient, as in the
fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572). Here one z is added at all tokens from which an
answer is predicted, so its gradient is their sum:

    z = sign Σ_t ∂NLL(own answer) / ∂h_t

It is then scaled to every state as random noise is (`training.latent_noise`). The authors' code takes the gradient at
one token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignx_ds.data.batches import Batch
from alignx_ds.evaluation.likelihood import log_probabilities
from alignx_ds.models.decoder_outputs import changed_output
from alignx_ds.training.latent_noise import before_answers


def ascent(model: PreTrainedModel, layer: nn.Module, part: Batch, size: int) -> Tensor:
    """z [B, 1, d] fp32 of the answers in a batch, where `size` is d; zeros for a row without an answer."""
    places = before_answers(part.labels).unsqueeze(-1)
    shift = torch.zeros(len(part.labels), 1, size, device=part.labels.device, requires_grad=True)
    with torch.enable_grad(), changed_output(layer, lambda hidden: hidden + (shift * places).to(hidden)):
        nll = -log_probabilities(model, part).sum()
        (gradient,) = torch.autograd.grad(nll, shift)
    return gradient.sign()
