"""launch/slurm.sh with stand-ins for Slurm's own commands: real local tasks, real signals, a requeue."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import HERE, RECIPE, REPO, SMALL, environment, finished, specialists, started, until

SCRIPT = REPO / "launch/slurm.sh"
JOB = "41234"
pytestmark = pytest.mark.timeout(300)


def job(tmp_path: Path, **more: str) -> dict[str, str]:
    """What Slurm sets for a job of two tasks on one node, and its commands on PATH."""
    slurm = {"JOB_ID": JOB, "JOB_NODELIST": "node[1-2]", "NTASKS": "2", "CPUS_PER_TASK": "1"}
    path = f"{HERE / 'slurm'}:{environment()['PATH']}"
    fakes = {"PATH": path, "STUB_DIRECTORY": str(tmp_path), "SLURM_FAKE_REQUEUED": str(tmp_path / "requeued")}
    return {f"SLURM_{name}": value for name, value in slurm.items()} | fakes | more


def reports(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]


def to_the_script(process: subprocess.Popen[str], tasks: list[int]) -> list[int]:
    return [process.pid]


def to_every_task(process: subprocess.Popen[str], tasks: list[int]) -> list[int]:
    """As Slurm does, with --signal=USR1@120."""
    return tasks


Receivers = Callable[[subprocess.Popen[str], list[int]], list[int]]


@pytest.mark.parametrize(
    ("signum", "receivers", "requeued"),
    [
        (signal.SIGUSR1, to_every_task, True),
        (signal.SIGUSR1, to_the_script, True),
        (signal.SIGTERM, to_the_script, False),
    ],
    ids=["time is up", "time is up, told to the script", "cancelled"],
)
def test_a_job_whose_time_is_up_goes_back_into_the_queue(
    tmp_path: Path, signum: signal.Signals, receivers: Receivers, requeued: bool
) -> None:
    """Every rank ends with 75, as after a checkpoint; the product itself is replaced by what starts at once."""
    with started(SCRIPT, RECIPE, cwd=HERE / "stub", **job(tmp_path)) as process:
        until(lambda: len(reports(tmp_path)) == 2, "both ranks started")
        for pid in receivers(process, [report["pid"] for report in reports(tmp_path)]):
            os.kill(pid, signum)
        assert process.wait(timeout=60) == 75
    kept = tmp_path / "requeued"
    assert (kept.read_text().split() if kept.exists() else []) == ([JOB] if requeued else [])


@pytest.mark.parametrize("code", [0, 1, 2])
def test_any_other_end_is_the_end(tmp_path: Path, code: int) -> None:
    with started(SCRIPT, RECIPE, cwd=HERE / "stub", **job(tmp_path, STUB_EXIT=str(code))) as process:
        assert process.wait(timeout=60) == code
    assert not (tmp_path / "requeued").exists()


def test_every_task_is_a_rank_and_an_array_has_its_numbers(tmp_path: Path) -> None:
    more = job(tmp_path, STUB_EXIT="0", SLURM_ARRAY_TASK_ID="3", SLURM_CPUS_PER_TASK="5", OMP_NUM_THREADS="")
    arguments = (RECIPE, "seed=%a", "output=runs/seed-%a", "axes.honest.prompt=two words")
    finished(SCRIPT, *arguments, cwd=HERE / "stub", **more)
    expected = ["run", RECIPE, "seed=3", "output=runs/seed-3", "axes.honest.prompt=two words"]
    for rank, report in enumerate(reports(tmp_path)):
        assert report["arguments"] == expected
        assert (report["RANK"], report["WORLD_SIZE"], report["LOCAL_RANK"]) == (str(rank), "2", str(rank))
        assert (report["MASTER_ADDR"], report["MASTER_PORT"]) == ("127.0.0.1", str(20000 + int(JOB) % 10000))
        assert report["OMP_NUM_THREADS"] == "5"


def test_slurm_finds_its_settings() -> None:
    """They end at the first command, and the signal is for the tasks: B: would keep it for the script."""
    lines = SCRIPT.read_text().splitlines()
    head = lines[: next(n for n, line in enumerate(lines) if line and not line.startswith("#"))]
    settings = [line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH ")]
    assert {"--signal=USR1@120", "--requeue", "--open-mode=append"} <= set(settings)


def test_a_dry_run(tmp_path: Path) -> None:
    output = tmp_path / "run"
    printed = finished(SCRIPT, RECIPE, *SMALL, f"output={output}", "--dry-run", **job(tmp_path))
    assert "memory per rank on 2 ranks" in printed and "dry run: everything is checked" in printed
    assert not output.exists()


@pytest.mark.launchers
def test_it_makes_what_deepspeed_makes(one_node: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    finished(SCRIPT, RECIPE, *SMALL, f"output={output}", **job(tmp_path, VERB="specialists"))
    assert specialists(output) == specialists(one_node)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_the_scripts_are_sound() -> None:
    scripts = sorted((REPO / "launch").glob("*.sh"))
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
