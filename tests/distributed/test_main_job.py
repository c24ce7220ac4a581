"""The main job on two real ranks, tiny: all is made, a second run reuses it, tampering and mix-ups are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignx_ds.data.world.files import write_files

SYSTEMS = ["base", "helpful", "harmless", "honest", "sequential", "mixed", "alignx"]
SMALL = (
    "launch.ranks=2",
    "align.ep_size=2",
    "data.train_rows=80",
    "data.held_out_rows=12",
    "train.steps=2",
    "train.batch=8",
    "align.steps=2",
    "align.batch=8",
    "gate.latent=8",
    "gate.output_latent=8",
    "gate.anchors=8",
    "experts.rank=4",
    "experts.feature_rows=16",
    "evaluation.max_new_tokens=4",
)


def start(repo: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    outside = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    command = [sys.executable, "-m", "alignx_ds", *arguments]
    return subprocess.run(command, cwd=repo, env=outside, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> tuple[Path, list[str], str]:
    """(output, arguments, terminal output) of a finished run on rows from files, not from the built-in world."""
    root = tmp_path_factory.mktemp("main-job")
    write_files(root / "rows", 90, seed=3)
    sources = {
        "axes.helpful": "alpaca",
        "axes.harmless": "beavertails",
        "axes.honest": "truthfulqa",
        "generalist": "plain",
    }
    files = {path.stem: path for path in (root / "rows").iterdir()}
    data = [
        f"{key}.{part}={files[f'{schema}_{part}']}" for key, schema in sources.items() for part in ("train", "held_out")
    ]
    arguments = ["launch/recipes/world.yaml", *SMALL, *data, f"output={root / 'run'}"]
    done = start(repo_root, "run", *arguments)
    assert done.returncode == 0, done.stderr
    return root / "run", arguments, done.stdout


@pytest.mark.timeout(300)
def test_the_report_holds_every_system_and_the_router(made: tuple[Path, list[str], str]) -> None:
    output, _, shown = made
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    assert list(report["systems"]) == SYSTEMS
    for scores in report["systems"].values():
        axes = [scores[axis] for axis in ("helpful", "harmless", "honest")]
        assert all(0 <= score <= 100 for score in axes)
        assert scores["avg"] == pytest.approx(sum(axes) / 3)
        assert 0 <= scores["benign_served"] <= 100
    assert {"accuracy", "ece", "brier"} <= set(report["router"])
    assert str(output / "report.html") in shown.replace("\n", "")
    page = (output / "report.html").read_text()
    assert page.count("<svg") == 3 and "http://" not in page.split("<body>")[0]  # self-contained
    assert list((output / "tensorboard").rglob("events.*"))


def test_every_answer_is_kept(made: tuple[Path, list[str], str]) -> None:
    output, _, _ = made
    for system in SYSTEMS:
        lines = (output / "answers" / f"{system}.helpful.jsonl").read_text().splitlines()
        assert len(lines) == 12
        assert set(json.loads(lines[0])) == {"prompt", "output", "reference"}


@pytest.mark.timeout(300)
def test_a_second_run_reuses_and_agrees_and_a_torn_file_is_refused(
    made: tuple[Path, list[str], str], repo_root: Path
) -> None:
    output, arguments, _ = made
    before = json.loads((output / "report.json").read_text())
    weights = (output / "model" / "model.safetensors").read_bytes()
    again = start(repo_root, "run", *arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("unchanged, reused from") == 7
    assert (output / "model" / "model.safetensors").read_bytes() == weights
    after = json.loads((output / "report.json").read_text())
    assert (after["systems"], after["router"]) == (before["systems"], before["router"])

    torn = output / "specialists" / "harmless" / "layer_003.safetensors"
    content = torn.read_bytes()
    torn.write_bytes(content[: len(content) // 2])
    refused = start(repo_root, "run", *arguments)
    torn.write_bytes(content)
    assert refused.returncode == 2
    assert "differs from its manifest" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_specialists_of_another_run_are_shared_but_never_made_over(
    made: tuple[Path, list[str], str],
    repo_root: Path,
    tmp_path: Path,
    snapshot: Callable[[Path], dict[str, bytes | None]],
) -> None:
    output, arguments, _ = made
    before = snapshot(output)
    other = [f"output={tmp_path / 'other'}", f"specialists={output / 'specialists'}", "train.lr=1e-5"]
    refused = start(repo_root, "specialists", *arguments, *other)
    assert refused.returncode == 2
    assert "made from other inputs" in refused.stderr
    assert snapshot(output) == before


def test_the_aligned_model_answers(made: tuple[Path, list[str], str], repo_root: Path) -> None:
    done = start(repo_root, "generate", str(made[0] / "model"), "hello , how are you ?", "good night .")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
