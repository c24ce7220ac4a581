"""The fusions' loss terms against their definitions, row by row, and their independence of how a batch is split."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_models import ALIGNX_LAYERS, base_model, generator, relative, table_of
from torch import Tensor

from alignx_ds.baselines.fusion import H3FUSION, TRINITYX, FullExperts, fusion_layers, replace_ffns
from alignx_ds.baselines.fusion_losses import Drift, FusionTerms, fusion_terms, gate_terms
from alignx_ds.config.schema import FusionConfig

LENGTHS, OWN = [5, 9, 3, 7], [2, None, 0, 1]  # the second row needs no axis
AXES = torch.tensor([[float(expert == own) for expert in range(3)] for own in OWN])
MASK = (torch.arange(9) < torch.tensor(LENGTHS).unsqueeze(1)).long()


def logits(seed: int = 2) -> Tensor:
    return torch.randn(4, 9, 3, generator=generator(seed))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gate_terms_row_by_row(temperature: float) -> None:
    gating, entropy = gate_terms(logits(), MASK, AXES, temperature)
    missed, entropies = [], []
    for row, length in enumerate(LENGTHS):
        gates = (logits()[row, :length].double() / temperature).softmax(-1)
        missed.append(0.0 if OWN[row] is None else -math.log(float(gates.mean(0)[OWN[row]])))
        entropies.append(float(-(gates * gates.log()).sum(-1).mean()))
    assert float(gating) == pytest.approx(sum(missed) / 4, rel=1e-5)
    assert float(entropy) == pytest.approx(sum(entropies) / 4, rel=1e-5)


def test_gate_terms_do_not_depend_on_padding() -> None:
    changed = logits()
    changed[MASK == 0] = 50.0
    for before, after in zip(gate_terms(logits(), MASK, AXES, 1.0), gate_terms(changed, MASK, AXES, 1.0), strict=True):
        assert float(before) == pytest.approx(float(after), rel=1e-6)


def test_parts_of_a_batch_average_to_the_whole_batch() -> None:
    """Though the part without the unclaimed row has more rows with a label: DeepSpeed averages ranks alike."""
    whole = gate_terms(logits(), MASK, AXES, 1.0)
    parts = [gate_terms(logits()[s], MASK[s], AXES[s], 1.0) for s in (slice(0, 2), slice(2, 4))]
    for n in range(2):
        assert float(whole[n]) == pytest.approx(float(parts[0][n] + parts[1][n]) / 2, rel=1e-5)


def test_several_axes_weigh_alike_and_rows_as_they_are_told() -> None:
    axes = AXES.clone()
    axes[0] = torch.tensor([1.0, 0.0, 1.0])
    each = [gate_terms(logits(), MASK, torch.eye(3)[[n] * 4], 1.0)[0] for n in range(3)]
    first = [float(gate_terms(logits()[:1], MASK[:1], torch.eye(3)[[n]], 1.0)[0]) for n in (0, 2)]
    rest = float(gate_terms(logits()[1:], MASK[1:], AXES[1:], 1.0)[0]) * 3
    assert float(gate_terms(logits(), MASK, axes, 1.0)[0]) == pytest.approx((sum(first) / 2 + rest) / 4, rel=1e-5)
    weights = torch.tensor([2.0, 1.0, 0.0, 0.0])
    assert float(gate_terms(logits(), MASK, axes, 1.0, weights)[0]) == pytest.approx(sum(first) / 4, rel=1e-5)
    assert float(gate_terms(logits(), MASK, torch.ones(4, 3), 1.0)[0]) == pytest.approx(float(sum(each)) / 3, rel=1e-5)


def test_a_row_that_no_axis_claims_moves_no_gate() -> None:
    given = logits().requires_grad_()
    gate_terms(given, MASK, AXES, 1.0)[0].backward()
    assert given.grad is not None
    assert not given.grad[1].any() and given.grad[0, : LENGTHS[0]].any()
    assert not given.grad[0, LENGTHS[0] :].any()


def test_a_certain_miss_has_a_finite_loss_and_gradient() -> None:
    given = torch.tensor([[[200.0, 0.0, 0.0]]], requires_grad=True)
    gating, entropy = gate_terms(given, torch.ones(1, 1), torch.tensor([[0.0, 1.0, 0.0]]), 1.0)
    (gating + entropy).backward()
    assert float(gating.detach()) == pytest.approx(200.0)
    assert given.grad is not None and torch.isfinite(given.grad).all()
    assert given.grad[0, 0, :2].tolist() == pytest.approx([1.0, -1.0]), "the gradient does not vanish"


def model_of(settings=TRINITYX):  # type: ignore[no-untyped-def]
    model = copy.deepcopy(base_model())
    replace_ffns(model, table_of(model), ALIGNX_LAYERS, lambda _, ffn: FullExperts([ffn] * 3, settings))
    return model.train()


@torch.no_grad()
def test_drift_is_the_relative_change_of_the_experts_alone() -> None:
    model = model_of()
    drift = Drift(model)
    assert float(drift.of(model)) == 0.0
    for block in fusion_layers(model):
        block.gate.weight.add_(1.0)
        for weight in block.weights.values():
            weight.mul_(1.1)
    assert float(drift.of(model)) == pytest.approx(0.01, rel=1e-4)


@torch.no_grad()
def test_an_expert_s_drift_has_its_own_scale() -> None:
    model = model_of()
    drift, first, last = Drift(model), Drift(model, [2.0, 0.0, 0.0]), Drift(model, [0.0, 0.0, 3.0])
    for block in fusion_layers(model):
        for weight in block.weights.values():
            weight[0].add_(0.1)
            weight[1].add_(0.7)
    moved = sum(w[0].numel() * 0.1**2 for block in fusion_layers(model) for w in block.weights.values()) / drift.size
    assert float(first.of(model)) == pytest.approx(2 * moved, rel=1e-4)
    assert float(last.of(model)) == 0.0
    assert float(drift.of(model)) == pytest.approx(50 * moved, rel=1e-4)


def test_drift_pulls_back() -> None:
    model = model_of()
    drift = Drift(model)
    weight = fusion_layers(model)[0].weights["up"]
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(0.5)
    drift.of(model).backward()
    assert weight.grad is not None and relative(weight.grad * drift.size / 2, weight.detach() - before) < 1e-5


def test_terms_are_means_over_the_layers_and_uniform_is_the_kl_from_uniform() -> None:
    model = model_of()
    for number, block in enumerate(fusion_layers(model)):
        block.logits = logits(seed=number).flatten(0, 1)
    zero = torch.zeros(())
    terms = fusion_terms(fusion_layers(model), zero, zero, MASK, AXES)
    each = [gate_terms(logits(seed=n), MASK, AXES, TRINITYX.temperature) for n in range(len(ALIGNX_LAYERS))]
    assert float(terms.gating) == pytest.approx(float(sum(g for g, _ in each)) / len(each))
    gates = [(logits(n) / TRINITYX.temperature).softmax(-1) for n in range(len(ALIGNX_LAYERS))]
    kl = [((g * (g * 3).log()).sum(-1) * MASK).sum(1) / MASK.sum(1) for g in gates]
    assert float(terms.uniform) == pytest.approx(float(torch.stack(kl).mean()), rel=1e-5)


def test_every_term_has_its_weight() -> None:
    parts = [torch.tensor(float(10**n)) for n in range(5)]
    terms = FusionTerms(*parts)
    stage = FusionConfig(gating=2.0, drift=3.0, entropy=4.0, uniform=5.0)
    assert float(terms.total(stage)) == 54321.0
    assert terms.scalars() == {"lm": 1.0, "gating": 10.0, "drift": 100.0, "entropy": 1000.0, "uniform": 10000.0}


def test_terms_need_a_forward_pass_in_training_mode() -> None:
    model = model_of(H3FUSION)
    with pytest.raises(AssertionError, match="in training only"):
        fusion_terms(fusion_layers(model), torch.zeros(()), torch.zeros(()), MASK, AXES)
