"""An assembled model starts from what stage 1 made and from zeros: nothing in it is drawn at random."""

from __future__ import annotations

import pytest
import torch
from tiny_models import aligned, base_model, low_rank_experts

from alignx_ds.mocae.layer import alignx_layers, gates_of
from alignx_ds.mocae.modeling import Placement


@pytest.mark.parametrize("placement", [None, Placement(1, 0)], ids=["fused", "expert-parallel"])
def test_two_models_are_the_same_whatever_was_drawn_before(placement: Placement | None) -> None:
    states = []
    for seed in (1, 2):
        base = base_model()
        experts = low_rank_experts(base)
        torch.manual_seed(seed)
        states.append(aligned(base, experts, trained=False, placement=placement).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_routers_and_reinjections_start_at_zero() -> None:
    base = base_model()
    model = aligned(base, low_rank_experts(base), trained=False)
    assert not any(gate.router.weight.any() for gate in gates_of(model).values())
    assert not any(layer.calibration.reinjection.any() for layer in alignx_layers(model))
