"""What serves an unsure prompt, and least gates: on both paths, in both kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import (
    EXPERTS,
    aligned,
    base_model,
    generator,
    low_rank_experts,
    padded,
    random_geometry,
    random_rows,
    relative,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignx_ds.mocae.gate import CalibratedGate, Query, round_needs
from alignx_ds.mocae.modeling import AlignXForCausalLM, Placement
from alignx_ds.mocae.serving import ServingRules, gates_of_needs
from alignx_ds.mocae.settings import ALL, GateSettings

KINDS = ("choice", "needs")
NAMES = ("generalist", "helpful", "harmless", "honest")
BASE = base_model()
IDS, MASK = padded(random_rows([5, 12, 8]))
QUERY = Query(torch.randn(64, 32, generator=generator(3)), torch.randn(64, EXPERTS, generator=generator(4)))


def make(kind: str, absent: tuple[int, ...] = (), **rules: object) -> CalibratedGate:
    geometry = random_geometry(6, 1)
    geometry.present[list(absent)] = 0
    gate = CalibratedGate(geometry, GateSettings(kind=kind), ServingRules(**rules)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        gate.router.weight.copy_(torch.randn(gate.router.weight.shape, generator=generator(2)))
        gate.calibration_temperature.fill_(0.7)
    return gate


@pytest.mark.parametrize(
    ("needs", "gates"),
    [
        ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]),
        ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]),
        ([1.0, 0.0, 1.0], [0.0, 0.5, 0.0, 0.5]),
        ([0.5, 0.125, 0.25], [0.125, 0.5, 0.125, 0.25]),
        ([0.5, 0.5, 0.0], [0.0, 0.5, 0.5, 0.0]),
        ([1.0, 0.5, 0.5], [0.0, 0.5, 0.25, 0.25]),
    ],
    ids=["none", "one", "two", "less than one in all", "one in all", "two in all"],
)
def test_whole_needs_share_a_prompt_and_small_ones_are_gates_as_they_are(
    needs: list[float], gates: list[float]
) -> None:
    assert gates_of_needs(torch.tensor(needs)).tolist() == gates


def test_gates_of_needs_are_never_negative_and_the_generalist_has_none_beside_a_whole_need() -> None:
    needs = torch.rand(999, 3, generator=generator(5))
    needs[::3, 1] = 1.0
    gates = gates_of_needs(needs)
    assert (gates >= 0).all() and not gates[::3, 0].any()
    torch.testing.assert_close(gates.sum(-1), torch.ones(999))


@torch.no_grad()
def test_needs_are_sure_of_two_axes_or_of_none() -> None:
    gate = make("needs")
    decision = gate(QUERY)
    needs = decision.needs()
    expected = torch.maximum(needs.amax(-1), (1 - needs).prod(-1))
    torch.testing.assert_close(decision.confidence(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(make("choice")(QUERY).confidence(), make("choice")(QUERY).probabilities().amax(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("unsure", "instead"),
    [(0, [1.0, 0, 0, 0]), (2, [0, 0, 1.0, 0]), (ALL, [0, 1 / 3, 1 / 3, 1 / 3])],
)
@torch.no_grad()
def test_what_serves_where_the_gate_is_unsure(kind: str, unsure: int | str, instead: list[float]) -> None:
    plain = make(kind)(QUERY)
    below = float(plain.confidence().median()) + 1e-4
    decision = make(kind, unsure=unsure, below=below)(QUERY)
    low = plain.confidence() < below
    assert low.any() and not low.all()
    assert torch.equal(decision.gates[~low], plain.gates[~low])
    torch.testing.assert_close(decision.gates[low], torch.tensor(instead).expand(int(low.sum()), -1))


@torch.no_grad()
def test_all_axes_are_those_that_have_queries() -> None:
    gates = make("choice", absent=(1,), unsure=ALL, below=1.1)(QUERY).gates
    torch.testing.assert_close(gates, torch.tensor([0, 0, 0.5, 0.5]).expand(64, -1))


FLOORS = (0.0, 0.0, 0.3, 0.1)


@torch.no_grad()
def test_in_a_choice_floors_are_least_gates() -> None:
    gate, plain = make("choice", floors=FLOORS), make("choice")(QUERY).gates
    gates = gate(QUERY).gates
    assert (gates >= torch.tensor(FLOORS) - 1e-6).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(64))
    torch.testing.assert_close(gates, torch.tensor(FLOORS) + 0.6 * plain)
    assert torch.equal(gate.train()(QUERY).gates, make("choice").train()(QUERY).gates)


@torch.no_grad()
def test_in_needs_floors_are_least_needs_before_these_share_a_prompt() -> None:
    gate = make("needs", floors=FLOORS)
    floored = torch.maximum(round_needs(gate(QUERY).needs(), gate.settings.rounding), torch.tensor(FLOORS[1:]))
    assert (floored.sum(-1) > 1).any() and (floored.sum(-1) < 1).any()
    assert torch.equal(gate(QUERY).gates, gates_of_needs(floored))
    assert torch.equal(gate.train()(QUERY).gates, make("needs").train()(QUERY).gates)


@pytest.mark.parametrize("unsure", ["", "harmless", ALL])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_both_paths_and_a_saved_model_keep_the_rules(kind: str, unsure: str, tmp_path: Path) -> None:
    def made(placement: Placement | None) -> AlignXForCausalLM:
        rules = {"unsure": unsure, "unsure_below": 0.9, "floors": {"harmless": 0.3}}
        return aligned(BASE, low_rank_experts(BASE), kind=kind, placement=placement, **rules)  # type: ignore[arg-type]

    fused = made(None)
    logits = fused(IDS, MASK).logits
    gates: Tensor = next(iter(fused.routing.decisions.values())).gates
    least = 0.3 if kind == "choice" else 0.3 / (0.3 + 1 + 1)  # beside two whole needs
    assert (gates[:, 2] >= least - 1e-6).all()
    expected = aligned(BASE, low_rank_experts(BASE), kind=kind)(IDS, MASK, forced=gates).logits
    assert relative(logits[MASK.bool()], expected[MASK.bool()]) < 1e-5, "no gate is left out by a count"
    assert relative(made(Placement(1, 0))(IDS, MASK).logits[MASK.bool()], logits[MASK.bool()]) < 1e-5
    fused.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS, MASK).logits, fused(IDS, MASK).logits)


def test_a_rule_for_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="none"):
        ServingRules.of(GateSettings(unsure="none"), {}, NAMES)
    for floors in ({"generalist": 0.1}, {"helpful": 1.5}):
        with pytest.raises(ValueError, match="floors has"):
            ServingRules.of(GateSettings(), floors, NAMES)
