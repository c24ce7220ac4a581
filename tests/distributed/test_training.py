"""Invariant 8 on real ranks: any world size, ep_size and accumulation trains the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems import VARIANTS, align_config, align_in_plain_torch, mixture, step_tokens
from worlds import Runs

TIMED = ("speed/", "memory/")  # curves that no two runs share
TOLERANCE = {"sgd": 1e-6, "adamw": 5e-5}  # Adam divides rounding by rounding where a gradient is almost zero


@pytest.fixture(scope="module")
def oracles() -> dict[str, dict[str, Any]]:
    """By variant, without the placement."""
    kinds = ("sgd", "adamw", "sgd forced", "sgd frozen")
    return {kind: align_in_plain_torch(kind.split()[0], "forced" in kind, "frozen" in kind) for kind in kinds}


@pytest.mark.parametrize(
    ("world", "variant"), [(world, variant) for world, variants in VARIANTS.items() for variant in variants]
)
def test_a_few_steps_give_plain_torch_s_weights(
    runs: Runs, oracles: dict[str, dict[str, Any]], world: int, variant: str
) -> None:
    expected = oracles[" ".join(variant.split()[:-2])]
    for made in (part[variant] for part in runs.of(world, "steps")):
        np.testing.assert_allclose(made["losses"], expected["losses"], rtol=1e-5)
        np.testing.assert_allclose(made["norms"], expected["norms"], rtol=1e-4)
        for name, weight in expected["weights"].items():
            assert float((made["weights"][name] - weight).abs().max()) < TOLERANCE[variant.split()[0]], name


@pytest.mark.parametrize(
    ("world", "variant"),
    [(world, variant) for world, variants in VARIANTS.items() for variant in variants if "forced" not in variant],
)
def test_the_router_s_curves_are_those_of_all_rows(
    runs: Runs, oracles: dict[str, dict[str, Any]], world: int, variant: str
) -> None:
    """On any ranks, in any number of micro batches; and padding is what the dispatch of all ranks holds of it."""
    expected = oracles[" ".join(variant.split()[:-2])]["curves"]
    for part in runs.of(world, "steps"):
        for number, (made, known) in enumerate(zip(part[variant]["curves"], expected, strict=True)):
            router = {name: value for name, value in made.items() if name.startswith("router/")}
            padding = router.pop("router/padding", None)
            assert router == pytest.approx(known, abs=2e-5)
            if "ep0" in variant:
                assert padding is None, "nothing is dispatched"
            elif variant.endswith("acc1"):
                assert padding == pytest.approx(
                    dispatched_padding(number, world, int(variant.split()[-2][2:])), abs=1e-6
                )


def dispatched_padding(step: int, world: int, ep_size: int) -> float:
    """In training every expert gets every token; a group's ranks agree on as many slots as its fullest needs."""
    tokens = [step_tokens(step, rank, world) for rank in range(world)]
    groups = [tokens[first : first + ep_size] for first in range(0, world, ep_size)]
    return 1 - sum(tokens) / sum(max(group) * len(group) for group in groups)


def test_the_dispatches_compared_hold_padding() -> None:
    assert dispatched_padding(0, 2, 1) == 0
    assert all(dispatched_padding(step, 2, 2) > 0.05 for step in range(align_config(1, 1).align.steps))


def test_the_whole_stage_writes_the_router_s_curves(runs: Runs) -> None:
    expected = runs.of(1, "whole_stage")[0]["ep1"]["curves"]
    assert {"loss", "lm", "router/entropy", "router/own/c", "router/share/generalist"} <= expected[0].keys()
    for made in runs.of(2, "whole_stage"):
        for ours, theirs in zip(made["ep1"]["curves"], expected, strict=True):
            made_here, known = ({n: v for n, v in c.items() if not n.startswith(TIMED)} for c in (ours, theirs))
            assert made_here == pytest.approx(known, rel=1e-4, abs=1e-4)


def test_the_steps_compared_do_train(oracles: dict[str, dict[str, Any]]) -> None:
    start = {n: p.detach() for n, p in mixture().named_parameters()}
    clip = align_config(1, 1).align.clip
    for made in oracles.values():
        assert all(norm > clip for norm in made["norms"])  # clipping is at work
        for name, weight in made["weights"].items():
            assert float((weight - start[name]).abs().max()) > 100 * TOLERANCE["sgd"], name


def test_the_generalist_stays_the_base_model(runs: Runs) -> None:
    """Its factors start at zero, and zero factors have zero gradients."""
    for variant in ("sgd ep2 acc1", "adamw ep2 acc1"):
        changed = runs.of(2, "steps")[0][variant]["generalist"]
        assert len(changed) == 2 * 6 and not any(changed)


def test_all_ranks_end_with_the_same_model(runs: Runs) -> None:
    first, second = (part["adamw ep2 acc1"]["weights"] for part in runs.of(2, "steps"))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_the_whole_stage_gives_one_model_at_any_ep_size_and_with_a_sharded_trunk(runs: Runs) -> None:
    for part in runs.of(2, "whole_stage"):
        for how in ("ep2", "ep0", "ep0 zero3"):
            assert_same(part[how], part["ep1"])


def test_the_whole_stage_gives_one_model_at_any_world_size(runs: Runs) -> None:
    assert_same(runs.of(2, "whole_stage")[0]["ep1"], runs.of(1, "whole_stage")[0]["ep1"])


def assert_same(made: dict[str, Any], expected: dict[str, Any]) -> None:
    """Geometry, trained weights and temperatures, to rounding."""
    np.testing.assert_allclose(made["losses"], expected["losses"], rtol=1e-5)
    assert made["state"].keys() == expected["state"].keys()
    for name, tensor in expected["state"].items():
        np.testing.assert_allclose(made["state"][name], tensor, rtol=1e-3, atol=1e-4, err_msg=name)


def test_untrained_experts_take_no_gradient_no_state_and_no_checkpoint(runs: Runs) -> None:
    start = mixture().state_dict()
    for part in runs.of(2, "untrained"):
        trained, untrained = part["0.5"], part["0.0"]
        assert any("deepspeed_experts" in name for name in trained["trained"])
        assert set(untrained["trained"]) - {"stand_in"} == {n for n in trained["trained"] if ".mixture." not in n}
        assert untrained["names"] == [name for name in trained["names"] if ".mixture." not in name]
        assert 3 * untrained["numbers"] < trained["numbers"]
        assert 2 * untrained["partitions"] < trained["partitions"]
        weights = {name: weight for name, weight in untrained["weights"].items() if name != "stand_in"}
        moved = {name for name, weight in weights.items() if not torch.equal(weight, start[name])}
        assert moved and not any(".mixture." in name for name in moved)


def test_a_checkpoint_without_experts_resumes_to_the_same_losses(runs: Runs) -> None:
    for part in runs.of(2, "untrained"):
        for made in part.values():
            whole, resumed = made["losses"]
            assert resumed == whole and len(whole) == 3
        np.testing.assert_allclose(
            part["0.0"]["losses"][0], align_in_plain_torch("adamw", frozen=True)["losses"], rtol=1e-5
        )
