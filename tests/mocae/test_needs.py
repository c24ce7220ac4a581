"""A gate of needs: each axis has its own probability of being needed; outputs or weights are mixed in differences."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.special import expit
from tiny_models import (
    ALIGNX_LAYERS,
    EXPERTS,
    aligned,
    base_model,
    generator,
    low_rank_experts,
    padded,
    random_geometry,
    random_rows,
    relative,
    table_of,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.mocae.fused import FusedMixture, RowExpert
from alignx_ds.mocae.gate import CalibratedGate, Query, round_needs
from alignx_ds.mocae.kv_cache import ARGUMENT, kv_cache
from alignx_ds.mocae.layer import alignx_layers, gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM, Placement
from alignx_ds.mocae.routing_state import Counts
from alignx_ds.mocae.serving import ServingRules, gates_of_needs
from alignx_ds.mocae.settings import GateSettings
from alignx_ds.training.losses import gating_terms

PATHS = {"fused": None, "parallel": Placement(1, 0)}
BASE = base_model()
IDS, MASK = padded(random_rows([5, 12, 8]))


ROUNDING = GateSettings().rounding


def make(top_k: int = 0, absent: tuple[int, ...] = (), rounding: float = ROUNDING) -> CalibratedGate:
    geometry = random_geometry(6, 1)
    geometry.present[list(absent)] = 0
    gate = CalibratedGate(geometry, GateSettings(kind="needs", top_k=top_k, rounding=rounding)).eval()
    with torch.no_grad():
        for parameter in gate.router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(2)))
    return gate


def rounded(need: float) -> float:
    return 0.0 if need < ROUNDING else 1.0 if need > 1 - ROUNDING else need


def shared(needs: list[float]) -> list[float]:
    return gates_of_needs(torch.tensor(needs)).tolist()


QUERY = Query(torch.randn(64, 32, generator=generator(3)), torch.randn(64, EXPERTS, generator=generator(4)))


def test_a_need_is_the_logistic_function_of_a_logit_less_the_generalist_s() -> None:
    decision = make()(QUERY)
    logits = decision.logits.detach().double().numpy()
    needs = expit(logits[:, 1:] - logits[:, :1])
    torch.testing.assert_close(decision.needs().double(), torch.from_numpy(needs), rtol=1e-5, atol=1e-7)
    assert decision.gates.tolist() == [shared([rounded(n) for n in row]) for row in decision.needs().tolist()]
    assert (decision.gates[:, 0] == 0).any() and (decision.gates[:, 0] > 0).any()


def test_the_bias_moves_every_logit() -> None:
    gate = make()
    before = gate(QUERY).logits
    with torch.no_grad():
        gate.router.bias.add_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    torch.testing.assert_close(gate(QUERY).logits - before, torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(64, -1))


@pytest.mark.parametrize("top_k", [1, 2])
def test_serving_keeps_the_axes_that_are_needed_most(top_k: int) -> None:
    gate = make(top_k=top_k)
    served, trained = gate(QUERY), gate.train()(QUERY)
    assert torch.equal(trained.gates, gates_of_needs(trained.needs()))
    for row, every in zip(served.gates.tolist(), trained.needs().tolist(), strict=True):
        kept = sorted(every, reverse=True)[:top_k]
        assert row == shared([rounded(need) if need in kept else 0.0 for need in every])


def test_an_axis_without_queries_is_never_needed_and_a_generalist_without_any_is_the_zero() -> None:
    without_axis, whole = make(absent=(2,))(QUERY), make()(QUERY)
    assert not without_axis.gates[:, 2].any()
    assert torch.equal(without_axis.needs()[:, [0, 2]], whole.needs()[:, [0, 2]])
    alone = make(absent=(0,))(QUERY)
    assert not alone.logits[:, 0].any()
    torch.testing.assert_close(alone.needs(), whole.logits[:, 1:].sigmoid())


def test_the_gating_terms_are_sums_over_independent_axes() -> None:
    gate, sets = make(), torch.nn.functional.one_hot(torch.arange(64) % EXPERTS, EXPERTS).float()
    sets[::5, 1:3] = torch.tensor([1.0, 1.0])  # two needs
    sets[:, 0] = (sets[:, 1:].sum(-1) == 0).float()
    decision = gate(QUERY)
    cross_entropy, entropy, prior = gating_terms(gate, QUERY, decision, sets)
    yes = decision.needs().detach().double()
    parts = gate.parts(QUERY)
    calibrators = sum(term for name, term in parts.items() if name != "linear")
    assert isinstance(calibrators, Tensor)
    known = (calibrators[:, 1:] - calibrators[:, :1]).detach().double().sigmoid()
    needed = sets[:, 1:].double()
    likelihood = torch.where(needed > 0, yes, 1 - yes).log().sum(-1)
    each = -(yes * yes.log() + (1 - yes) * (1 - yes).log())
    divergence = yes * (yes / known).log() + (1 - yes) * ((1 - yes) / (1 - known)).log()
    assert float(cross_entropy) == pytest.approx(-float(likelihood.mean()), rel=1e-4)
    assert float(entropy) == pytest.approx(float(each.sum(-1).mean()), rel=1e-4)
    assert float(prior) == pytest.approx(float(divergence.sum(-1).mean()), rel=1e-3)
    for term in (cross_entropy, entropy, prior):
        for gradient in torch.autograd.grad(term, list(gate.router.parameters()), retain_graph=True):
            assert gradient.any()


def needs_model(**settings: object) -> AlignXForCausalLM:
    return aligned(BASE, low_rank_experts(BASE), kind="needs", **settings)  # type: ignore[arg-type]


@torch.no_grad()
def test_outputs_are_mixed_in_differences_from_the_base() -> None:
    """FFN₀ + Σᵢ rᵢ (FFNᵢ − FFN₀) / max(1, Σᵢ rᵢ)."""
    mixture = alignx_layers(needs_model())[0].mixture
    x = torch.randn(2, 5, 32, generator=generator(1))
    needs = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.0, 0.3]])
    gates = gates_of_needs(needs).unsqueeze(1)
    each = [mixture(x, torch.eye(EXPERTS)[e].expand(2, 1, -1)) for e in range(EXPERTS)]
    of = needs / torch.tensor([[1.8], [1.0]])
    expected = each[0] + sum(of[:, i, None, None] * (each[i + 1] - each[0]) for i in range(3))
    assert relative(mixture(x, gates), expected) < 1e-5
    for axes in (None, 3):
        assert relative(mixture(x, gates, EXPERTS, axes=axes), expected) < 1e-5


@pytest.mark.parametrize("combine", ["outputs", "weights"])
@pytest.mark.parametrize(
    "needs",
    [[[0.0, 0.6, 0.0], [0.3, 0.0, 0.0]], [[0.9, 0.0, 0.8], [0.0, 0.4, 0.0]], [[0.4, 0.0, 0.6], [0.0, 1.0, 0.0]]],
    ids=["one partly", "two", "two that sum to one"],
)
@torch.no_grad()
def test_the_gathered_factors_of_a_few_axes_give_what_all_factors_give(combine: str, needs: list[list[float]]) -> None:
    mixture = alignx_layers(needs_model(combine=combine))[0].mixture
    assert isinstance(mixture, FusedMixture)
    x, needed = torch.randn(2, 5, 32, generator=generator(1)), torch.tensor(needs)
    gates = gates_of_needs(needed).unsqueeze(1)
    every = mixture(x, gates)
    counts = Counts.read(gates.squeeze(1))
    gathered: list[RowExpert] = []
    for tokens in (5, 1):  # a prefill, and a decode step with what it has left
        one = mixture(x[:, :tokens], gates, counts.gates, gathered, axes=counts.axes)
        assert relative(one, every[:, :tokens]) < 1e-5
    ranks = sum(own.up_out.shape[1] for own in gathered)
    assert ranks == counts.axes * mixture.up_out.shape[1], "the generalist has no factors to read"


@torch.no_grad()
def test_needs_are_rounded_when_they_serve_and_floors_stay() -> None:
    needs = torch.tensor([[0.997, 0.002, 0.001], [0.5, 0.989, 0.011]])
    assert torch.equal(round_needs(needs, ROUNDING), torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.989, 0.011]]))
    geometry = random_geometry(6, 1)
    floored = CalibratedGate(geometry, GateSettings(kind="needs"), ServingRules(floors=(0, 0, 0.005, 0))).eval()
    with torch.no_grad():
        floored.router.weight.normal_(generator=generator(2)).mul_(3)
    found, needs = floored(QUERY).gates, floored(QUERY).needs()
    assert (found[:, 2] > 0).all() and (found[needs.argmin(-1) == 1, 2] > 0.002).all()
    assert torch.equal(floored.train()(QUERY).gates, gates_of_needs(needs))


@torch.no_grad()
def test_with_a_rounding_of_a_half_every_need_is_whole_or_none() -> None:
    gate, plain = make(rounding=0.5), make()
    needs = plain(QUERY).needs()
    partly = (needs > ROUNDING) & (needs < 1 - ROUNDING)
    assert (partly & (needs > 0.5)).any() and (partly & (needs < 0.5)).any()
    assert torch.equal(gate(QUERY).gates, gates_of_needs((needs > 0.5).float()))
    assert torch.equal(gate(QUERY).needs(), needs), "how sure the gate is stays to be seen"
    assert torch.equal(gate.train()(QUERY).gates, plain.train()(QUERY).gates), "training uses the needs as they are"


@pytest.mark.parametrize("combine", ["outputs", "weights"])
@torch.no_grad()
def test_a_prompt_that_needs_one_axis_takes_a_choice_s_path(combine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its expert's factors alone are multiplied, and how many serve it is read once, at prefill."""
    model, reads, read = needs_model(combine=combine), [], Counts.read
    monkeypatch.setattr(Counts, "read", lambda gates: reads.append(1) or read(gates))
    (gate,) = gates_of(model).values()
    gate.router.bias += torch.tensor([0.0, -200.0, 200.0, -200.0])
    choice = aligned(BASE, low_rank_experts(BASE))
    ids, answer = torch.tensor(random_rows([6])), torch.tensor(random_rows([3], seed=2))
    forced = torch.eye(EXPERTS)[[2]]
    out, other = model(ids, use_cache=True), choice(ids, forced=forced, use_cache=True)
    assert torch.equal(out.logits, other.logits)
    decoded = model(answer, use_cache=True, **{ARGUMENT: kv_cache(out)})
    expected = choice(answer, forced=forced, use_cache=True, **{ARGUMENT: kv_cache(other)})
    assert torch.equal(decoded.logits, expected.logits)
    assert model.routing.counts == {ALIGNX_LAYERS[0]: Counts(1, 1)} and len(reads) == 2  # the other are the forced
    assert not model.routing.gathered and model.routing.groups[ALIGNX_LAYERS[0]].parts == [(1, 0, 1)]
    model.forward_pass.fixed = True
    model(ids, use_cache=True)
    assert model.routing.counts == {ALIGNX_LAYERS[0]: Counts(4, 3)} and len(reads) == 2


@torch.no_grad()
def test_merged_weights_are_the_base_s_plus_the_weighted_changes() -> None:
    model, needs = needs_model(combine="weights"), torch.tensor([0.9, 0.8, 0.1])
    gates = gates_of_needs(needs).expand(3, -1)
    merged, table = copy.deepcopy(BASE), table_of(BASE)
    for index, layer in zip(ALIGNX_LAYERS, alignx_layers(model), strict=True):
        layer.calibration.reinjection.zero_()
        ffn = table.view(table.ffn_of(merged, index))
        for p in PROJECTIONS:
            for need, factors in zip(needs, layer.mixture.factors()[1:], strict=True):
                ffn.projection(p).weight += need / 1.8 * factors.delta(p)
    expected = merged(IDS, MASK).logits[MASK.bool()]
    assert relative(model(IDS, MASK, forced=gates).logits[MASK.bool()], expected) < 1e-5
    assert relative(needs_model()(IDS, MASK, forced=gates).logits[MASK.bool()], expected) > 1e-3


@pytest.mark.parametrize("combine", ["outputs", "weights"])
@torch.no_grad()
def test_with_one_hot_gates_every_mixture_is_a_choice_s(combine: str) -> None:
    choice = aligned(BASE, low_rank_experts(BASE))
    for e in range(EXPERTS):
        forced = torch.eye(EXPERTS)[[e] * 3]
        expected = choice(IDS, MASK, forced=forced).logits[MASK.bool()]
        assert relative(needs_model(combine=combine)(IDS, MASK, forced=forced).logits[MASK.bool()], expected) < 1e-5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scope", ["shared", "per_layer"])
def test_both_paths_are_one_function(scope: str, training: bool) -> None:
    cotangent = torch.randn(3, IDS.shape[1], 50, generator=generator(8)) * MASK.unsqueeze(-1)
    logits, routers = [], []
    for placement in PATHS.values():
        model = needs_model(scope=scope, placement=placement).train(training)
        out = model(IDS, MASK).logits
        (out * cotangent).sum().backward()
        logits.append(out.detach()[MASK.bool()])
        routers.append([p.grad for gate in gates_of(model).values() for p in gate.router.parameters()])
    assert relative(logits[1], logits[0]) < 1e-5
    for other, expected in zip(*reversed(routers), strict=True):
        assert expected is not None and other is not None and expected.any()
        assert relative(other, expected) < 1e-4


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_whole_needs_that_a_gate_decides_are_served_as_the_same_needs_forced(path: str) -> None:
    """Two needs and three, beside one and none: on each path as on the fused one with the gates given."""
    needs = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.5, 0.25]])
    model = needs_model(placement=PATHS[path])
    (gate,) = gates_of(model).values()
    decide = gate.register_forward_hook(lambda _, __, decision: replace(decision, gates=gates_of_needs(needs)))
    decided = model(IDS, MASK).logits[MASK.bool()]
    decide.remove()
    forced = torch.tensor([[0.0, 0.5, 0.0, 0.5], [0.0, *[1 / 3] * 3], [0.25, 0.0, 0.5, 0.25]])
    assert relative(decided, needs_model()(IDS, MASK, forced=forced).logits[MASK.bool()]) < 1e-5
    one_by_one = [needs_model()(IDS[[i]], MASK[[i]], forced=forced[[i]]).logits[0] for i in range(3)]
    assert relative(decided, torch.stack(one_by_one)[MASK.bool()]) < 1e-5


@torch.no_grad()
def test_a_saved_model_keeps_its_kind(tmp_path: Path) -> None:
    model = needs_model(combine="weights", scope="per_layer")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS, MASK).logits, model(IDS, MASK).logits)
