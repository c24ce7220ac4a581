"""One tiny finished run, with its checkpoints, that all studies are made of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SMALL = (
    "launch.ranks=1",
    "align.ep_size=1",
    "model.layers=[3, 4]",
    "data.train_rows=80",
    "data.held_out_rows=16",
    "axes.honest.rows=80",
    "train.steps=4",
    "train.warmup_steps=1",
    "train.batch=8",
    "align.steps=4",
    "align.warmup_steps=1",
    "align.batch=8",
    "baselines.make=[]",
    "gate.latent=8",
    "gate.output_latent=8",
    "gate.anchors=8",
    "experts.rank=4",
    "experts.feature_rows=16",
    "evaluation.max_new_tokens=4",
    "checkpoints.every=2",
    "checkpoints.keep=20",
    "checkpoints.finished=true",
)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run on one rank."""
    output = tmp_path_factory.mktemp("study") / "run"
    command = [sys.executable, "-m", "alignx_ds", "run", "launch/recipes/world.yaml", *SMALL, f"output={output}"]
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in ranks} | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return output
