"""A finished run, tiny, made once through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = (
    *("launch.ranks=1", "align.ep_size=1", "data.train_rows=80", "data.held_out_rows=12", "baselines.make=[]"),
    *("train.steps=2", "train.batch=8", "train.lr=0.003", "train.warmup_steps=0"),
    *("align.steps=3", "align.batch=8", "align.lr=0.02", "align.warmup_steps=0"),
    *("gate.latent=8", "gate.output_latent=8", "gate.anchors=8", "experts.rank=4", "experts.feature_rows=16"),
    "evaluation.max_new_tokens=4",
)
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def command(repo_root: Path) -> Command:
    """`alignx-ds …` in a process of its own, in the project's directory."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        outside = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
        line = [sys.executable, "-m", "alignx_ds", *map(str, arguments)]
        return subprocess.run(
            line, cwd=repo_root, env=outside, capture_output=True, text=True, timeout=240, check=False
        )

    return run


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Settings that make the world's recipe a matter of seconds."""
    return SMALL


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory, command: Command, small: tuple[str, ...]) -> Path:
    """What a whole run leaves, baselines that are trained and report included."""
    output = tmp_path_factory.mktemp("export") / "run"
    done = command("run", "launch/recipes/world.yaml", *small, f"output={output}")
    assert done.returncode == 0, done.stderr
    return output
