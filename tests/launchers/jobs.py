"""The tiny main job that every launcher is to run, and processes that leave nothing running behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from processes import REPO, kill_group

HERE = Path(__file__).resolve().parent
AXES = ("helpful", "harmless", "honest")
RECIPE = "launch/recipes/world.yaml"
SMALL = (
    "launch.ranks=2",
    "align.ep_size=2",
    "data.train_rows=80",
    "data.held_out_rows=12",
    "train.steps=2",
    "train.batch=8",
    "train.warmup_steps=0",
    "align.steps=2",
    "align.batch=8",
    "align.warmup_steps=0",
    "gate.latent=8",
    "gate.output_latent=8",
    "gate.anchors=8",
    "experts.rank=4",
    "experts.feature_rows=16",
)
SET_BY_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_", "OMPI_", "GLOO_")


def environment(**more: str) -> dict[str, str]:
    """As a user has it who has activated the environment, on a machine without a GPU, under no launcher."""
    outside = {k: v for k, v in os.environ.items() if not k.startswith(SET_BY_LAUNCHERS)}
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    alone = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**outside, **alone, "PATH": programs, "PYTHONPATH": str(REPO), **more}


@contextmanager
def started(*command: str | Path, cwd: Path = REPO, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher in a process group of its own; on leaving, whatever is left of the group is killed."""
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_group(process)


def finished(*command: str | Path, timeout: float = 250.0, cwd: Path = REPO, **more: str) -> str:
    """What a launcher printed that has ended well."""
    with started(*command, cwd=cwd, **more) as process:
        try:
            printed, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as late:
            raise AssertionError(f"still running after {timeout:g} s: {late.stdout!r}") from late
    assert process.returncode == 0, printed
    return printed


def specialists(output: Path) -> dict[str, Any]:
    """What each was made from, its losses, and the hashes of what it has learned."""
    return {axis: _manifest(output / "specialists" / axis) for axis in AXES}


def aligned(output: Path) -> dict[str, Any]:
    return _manifest(output / "model")


def _manifest(directory: Path) -> Any:
    return json.loads((directory / "manifest.json").read_text())


def until(ready: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not within {timeout:g} s"
        time.sleep(0.05)
