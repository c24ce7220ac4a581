"""Weights and optimizer state move between world sizes, ZeRO stages and ep_sizes, and the training goes on."""

from __future__ import annotations

import json
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
class Left:
    losses: list[float]
    tensors: dict[str, Any]


def go(root: Path, kind: str, world: int, how: str, source: str, target: str, steps: int) -> Left:
    if not (root / "base").exists():
        write_base(root / "base")
    start(WORKER, world, str(root), kind, how, source, target, str(steps), logs=root / f"logs-{target}")
    said = json.loads((root / f"{target}.json").read_text())
    assert said["same"], "what was loaded, gathered again, is what was saved, to the last bit"
    tensors: dict[str, Any] = {}
    for file in (root / target / f"step_{steps:08d}").glob("rank*.safetensors"):
        tensors |= load_file(file)
    return Left(said["losses"], tensors)


def agree(a: Left, b: Left) -> None:
    assert b.losses == pytest.approx(a.losses, rel=1e-5)
    assert a.tensors.keys() == b.tensors.keys(), "canonical names know no ranks"
    for name, tensor in a.tensors.items():
        assert tensor.shape == b.tensors[name].shape
        scale = float(tensor.abs().max())
        assert float((tensor - b.tensors[name]).abs().max()) <= 1e-4 * scale + 1e-9, name


ROUTES = {
    "stage1": [(2, "3"), (4, "3"), (1, "2"), (2, "1")],
    "stage2": [(2, "2 ep2"), (4, "2 ep4"), (1, "1 ep1"), (4, "2 ep2")],
}


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ROUTES)
def test_a_job_moves_from_ranks_to_ranks_as_if_it_had_stayed(kind: str, tmp_path: Path, record: Record) -> None:
    (world, how), *others = ROUTES[kind]
    stayed = go(tmp_path, kind, world, how, "-", "stayed", 6)
    go(tmp_path, kind, world, how, "-", "moved2", 2)
    source = "moved2"
    for step, (ranks, how_now) in enumerate(others, start=3):
        go(tmp_path, kind, ranks, how_now, source, f"moved{step}", step)
        source = f"moved{step}"
    moved = go(tmp_path, kind, world, how, source, "end", 6)
    agree(stayed, moved)
    way = " → ".join(f"{w} ranks, ZeRO-{h.replace(' ep', ', ep_size ')}" for w, h in ROUTES[kind])
    record(
        "reshard", f"{kind}: {way}", "state equal to the bit after each move; losses and weights as if it had stayed"
    )


@pytest.mark.timeout(280)
def test_experts_move_from_two_ranks_to_one(tmp_path: Path, record: Record) -> None:
    stayed = go(tmp_path, "stage2", 2, "2 ep2", "-", "stayed", 4)
    go(tmp_path, "stage2", 2, "2 ep2", "-", "half", 2)
    agree(stayed, go(tmp_path, "stage2", 1, "2 ep1", "half", "moved", 4))
