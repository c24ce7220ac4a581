"""Weights and optimizer state move between world sizes, ZeRO stages and ep_sizes, and training continues the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from problems import write_base
from ranks import start
from recording import Record
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("reshard_worker.py")


@dataclass
class Trained:
    losses: list[float]
    tensors: dict[str, Any]  # of the last checkpoint


def train(root: Path, kind: str, world: int, how: str, source: str, target: str, steps: int, every: int = 0) -> Trained:
    """Train on `world` ranks; `every`: steps between checkpoints, 0 for one at the end."""
    if not (root / "base").exists():
        write_base(root / "base")
    arguments = (str(root), kind, how, source, target, str(steps), str(every or steps))
    start(WORKER, world, *arguments, logs=root / f"logs-{target}")
    report = json.loads((root / f"{target}.json").read_text())
    assert report["same"], "what was loaded, gathered again, equals what was saved, to the bit"
    tensors: dict[str, Any] = {}
    for file in (root / target / f"step_{steps:08d}").glob("rank*.safetensors"):
        tensors |= load_file(file)
    return Trained(report["losses"], tensors)


def assert_equal(a: Trained, b: Trained) -> None:
    assert b.losses == pytest.approx(a.losses, rel=1e-5)
    assert a.tensors.keys() == b.tensors.keys(), "the names in a checkpoint do not depend on the ranks"
    for name, tensor in a.tensors.items():
        assert tensor.shape == b.tensors[name].shape
        scale = float(tensor.abs().max())
        assert float((tensor - b.tensors[name]).abs().max()) <= 1e-4 * scale + 1e-9, name


ROUTES = {
    "stage1": [(2, "3"), (4, "3"), (1, "2"), (2, "1")],
    "stage1, LoRA": [(2, "3"), (4, "3"), (1, "2")],
    "stage2": [(2, "2 ep2"), (4, "2 ep4"), (1, "1 ep1"), (4, "2 ep2")],
    "stage2, fused path": [(2, "2 ep2"), (1, "1 ep0"), (2, "3 ep0"), (2, "2 ep1")],
    "stage2, untrained experts": [(2, "2 ep2"), (1, "1 ep1"), (4, "2 ep4")],
}


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ROUTES)
def test_training_continues_the_same_on_other_ranks(kind: str, tmp_path: Path, record: Record) -> None:
    (world, how), *others = ROUTES[kind]
    undisturbed = train(tmp_path, kind, world, how, "-", "undisturbed", 6)
    train(tmp_path, kind, world, how, "-", "moved2", 2)
    source = "moved2"
    for step, (ranks, new_how) in enumerate(others, start=3):
        train(tmp_path, kind, ranks, new_how, source, f"moved{step}", step)
        source = f"moved{step}"
    moved = train(tmp_path, kind, world, how, source, "end", 6)
    assert_equal(undisturbed, moved)
    way = " → ".join(f"{w} ranks, ZeRO-{h.replace(' ep', ', ep_size ')}" for w, h in ROUTES[kind])
    record("reshard", f"{kind}: {way}", "state equal to the bit after each move; losses and weights as without moves")


@pytest.mark.timeout(600)
def test_experts_move_from_two_ranks_to_one(tmp_path: Path) -> None:
    undisturbed = train(tmp_path, "stage2", 2, "2 ep2", "-", "undisturbed", 4, every=2)
    shutil.copytree(tmp_path / "undisturbed/step_00000002", tmp_path / "half/step_00000002")
    assert_equal(undisturbed, train(tmp_path, "stage2", 1, "2 ep1", "half", "moved", 4))
