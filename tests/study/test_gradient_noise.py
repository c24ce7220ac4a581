"""Noise along gradients: by hand for a linear model, first order for a real one, and where it changes what."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import aligned, base_model, generator, low_rank_experts
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignx_ds.data.batches import Batch, collate
from alignx_ds.data.encode import Example
from alignx_ds.evaluation.likelihood import log_probabilities
from alignx_ds.study.gradient_noise import ascent
from alignx_ds.training.latent_noise import before_answers, matched, perturbed


class Linear(nn.Module):
    """Embeddings, a layer that is the identity, and a head: a token's log-probabilities are those of W h."""

    def __init__(self, embedding: Tensor, head: Tensor) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding.from_pretrained(embedding), nn.Identity()
        self.head = nn.Linear(head.shape[1], len(head), bias=False)
        self.head.weight = nn.Parameter(head)
        self.config = SimpleNamespace(model_type="linear")

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.layer(self.embedding(input_ids))))


def linear() -> Any:
    """Three tokens, d = 3; the state of token 0 is 0, that of token 1 is (ln 2, 0, 0)."""
    embedding = torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0], [5.0, 5.0, 5.0]])
    return Linear(embedding, torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0], [0.0, 0.0, 2.0]]))


def test_the_gradient_of_a_linear_model_by_hand() -> None:
    """∂NLL/∂h = Σ_v p_v w_v − w_y. From the state 0 all p are ⅓: (⅓, ⅓, 1) − w_y.

    The answer 1 to the prompt 0: (⅓, −⅔, 2). The answer 1, 0: the second token, from (ln 2, 0, 0), has p = (½, ¼, ¼),
    so (½, ¼, 1¼) − (1, 0, 2) = (−½, ¼, −¾), and the sum is (−⅙, −5/12, 1¼).
    """
    model = linear()
    one = collate([Example((0, 1), 1)], pad_id=2)
    assert ascent(model, model.layer, one, 3).tolist() == [[[1, -1, 1]]]
    two = collate([Example((0, 1, 0), 1), Example((0, 1), 1), Example((0,), 1)], pad_id=2)
    assert ascent(model, model.layer, two, 3).tolist() == [[[-1, -1, 1]], [[1, -1, 1]], [[0, 0, 0]]]


def test_noise_without_a_direction_adds_the_mean_alone() -> None:
    """As of an empty answer, which has no gradient."""
    states = torch.tensor([[[2.0, 4.0, 6.0]]])
    torch.testing.assert_close(matched(torch.zeros(1, 1, 3), states), torch.full((1, 1, 3), 4.0))


def batch() -> Batch:
    return collate([Example((5, 6, 7, 8, 9), 2), Example((9, 10, 11), 2)], pad_id=0)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["base", "alignx"])
def test_it_raises_the_nll_of_a_real_model_more_than_random_noise(kind: str, layer: int) -> None:
    """Also below a gate, through which the gradient goes. The small step is its first order: all in one direction."""
    model: Any = base_model()
    if kind == "alignx":
        model = aligned(model, low_rank_experts(model))
    place = (model.backbone if kind == "alignx" else model).model.layers[layer]
    size, part = base_model().config.hidden_size, batch()
    along = ascent(model, place, part, size)
    random = torch.randn(len(part.labels), 1, size, generator=generator(1))
    plain, raised = nll(model, place, part, random, 0.0), nll(model, place, part, along, 0.02)
    assert bool((raised > plain).all())
    assert bool((raised > nll(model, place, part, random, 0.02)).all())
    assert bool((nll(model, place, part, -along, 0.02) < plain).all())
    assert all(parameter.grad is None for parameter in model.parameters())


def nll(model: PreTrainedModel, layer: nn.Module, part: Batch, noise: Tensor, strength: float) -> Tensor:
    with torch.no_grad(), perturbed(layer, noise, before_answers(part.labels), strength):
        return -log_probabilities(model, part)
