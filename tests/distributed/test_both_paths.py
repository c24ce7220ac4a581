"""Stage 2 on the fused path (`align.ep_size: 0`) and under expert parallelism: equal training, equal checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from problems import uneven_mixture
from safetensors.torch import load_file
from torch import Tensor
from worlds import Runs

KINDS = ("choice", "needs")  # needs serves with combine: weights, which training leaves aside on both paths
both_worlds = pytest.mark.parametrize("world", [1, 2])


def assert_close(made: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].shape == tensor.shape, name
        assert float((made[name] - tensor).abs().max()) <= 1e-4 * float(tensor.abs().max()) + 1e-9, name


def checkpoint(job: dict[str, Any]) -> dict[str, Tensor]:
    """After the second step."""
    directory: Path = job["checkpoint"]
    tensors: dict[str, Tensor] = {}
    for file in (directory / "step_00000002").glob("rank*.safetensors"):
        tensors |= load_file(file)
    return tensors


@both_worlds
@pytest.mark.parametrize("kind", KINDS)
def test_both_paths_give_the_same_losses_and_weights(runs: Runs, world: int, kind: str) -> None:
    start = uneven_mixture(kind, "outputs", None).state_dict()
    for part in runs.of(world, "paths"):
        fused, parallel = part[f"{kind} ep0"], part[f"{kind} ep{world}"]
        np.testing.assert_allclose(fused["losses"], parallel["losses"], rtol=1e-5)
        assert_close(fused["weights"], parallel["weights"])
        moved = {name for name, tensor in fused["weights"].items() if not tensor.equal(start[name])}
        assert {name.split(".mixture.")[1] for name in moved if ".mixture." in name} == {
            *("down_in", "up_in", "down_out", "up_out")
        }
        routed = {name for name in moved if ".self_attn." in name}
        expected = {f"{p}_proj.experts_{half}" for p in "qv" for half in ("down", "up")} if kind == "needs" else set()
        assert {name.split(".self_attn.")[1] for name in routed} == expected


@both_worlds
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_one_path_resumes_on_the_other(runs: Runs, world: int, kind: str) -> None:
    for part in runs.of(world, "paths"):
        for before, after in ((0, world), (world, 0)):
            whole, resumed = part[f"{kind} ep{before}"], part[f"{kind} ep{before} → ep{after}"]
            assert resumed["losses"][:2] == whole["losses"][:2], "it resumed"
            np.testing.assert_allclose(resumed["losses"], whole["losses"], rtol=1e-5)
            assert_close(resumed["weights"], whole["weights"])


@both_worlds
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_the_same_on_both_paths(runs: Runs, world: int, kind: str) -> None:
    """Its experts are the specialists, by global id, without what the fused path pads."""
    part = runs.of(world, "paths")[0]
    fused, parallel = checkpoint(part[f"{kind} ep0"]), checkpoint(part[f"{kind} ep{world}"])
    assert_close(fused, parallel)
    factors = {name: tensor for name, tensor in fused.items() if ".experts." in name}
    assert {name.split(".experts.")[1][0] for name in factors} == {"1", "2", "3"}
    assert {tensor.shape[0] for name, tensor in factors.items() if name.endswith("down.gate")} == {1}


@both_worlds
@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_padded_ranks_at_zero(runs: Runs, world: int, kind: str) -> None:
    """Of the gate projections, whose rank is 1 where the up projections' is 3: also after a move between the paths."""
    for part in runs.of(world, "paths"):
        for job in (f"{kind} ep0", f"{kind} ep{world} → ep0"):
            for name, tensor in part[job]["weights"].items():
                if name.endswith(("down_in", "up_in")):
                    assert not tensor[0, :, 1:].any() and tensor[0, :, :1].all() and tensor[1].any()
