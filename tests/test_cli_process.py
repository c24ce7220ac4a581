"""The command as a user starts it, in a process of its own; few, because each takes seconds to import torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

import alignx_ds
from alignx_ds.runtime.versions import version

WriteRecipe = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes | None]]
pytestmark = pytest.mark.usefixtures("no_launcher")
PREFIX = "alignx-ds: error: "


@pytest.fixture
def command(tmp_path: Path, repo_root: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str | Path, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, *python, "-m", "alignx_ds", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(repo_root)}
        return subprocess.run(
            line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    return run


Command = Callable[..., subprocess.CompletedProcess[str]]


def problems(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The problems of a refused command; anything else on its error stream, as a traceback, fails."""
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines
    assert [line for line in lines if not line.startswith(PREFIX)] == []
    return [line.removeprefix(PREFIX) for line in lines]


def test_unknown_keys_are_refused_with_what_was_meant(
    command: Command, write_recipe: WriteRecipe, tmp_path: Path, snapshot: Snapshot
) -> None:
    recipe = write_recipe()
    before = snapshot(tmp_path)
    found = problems(command("run", recipe, "train.stps=3", "seed=many"))
    assert len(found) == 2
    assert any("train.stps" in line and "did you mean 'train.steps'?" in line for line in found)
    assert any("seed: got 'many'" in line for line in found)
    assert snapshot(tmp_path) == before


def test_rows_without_a_column_are_named(
    command: Command, write_recipe: WriteRecipe, tmp_path: Path, snapshot: Snapshot
) -> None:
    row = {"prompt": "how do i rob the bank ?", "category": {}, "is_safe": True}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 2))
    recipe = write_recipe("axes.harmless.train=rows.jsonl")
    before = snapshot(tmp_path)
    (line,) = problems(command("run", recipe))
    assert line.startswith("rows.jsonl, row 1: no column 'response'")
    assert snapshot(tmp_path) == before


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    command: Command, write_recipe: WriteRecipe, tmp_path: Path, snapshot: Snapshot
) -> None:
    recipe = write_recipe("launch.ranks=2", "align.ep_size=2")
    before = snapshot(tmp_path)
    done = command("run", recipe, "--dry-run")
    assert done.returncode == 0
    assert done.stderr == ""
    for part in ("base model", "memory per rank on 2 ranks", "to train on", "align.ep_size=2"):
        assert part in done.stdout
    assert snapshot(tmp_path) == before


def test_the_version_is_the_package_s(command: Command) -> None:
    assert command("--version").stdout == f"alignx-ds {alignx_ds.__version__}\n"
    assert alignx_ds.__version__ == metadata.version("alignx-ds")
    assert version("no such distribution") == "not installed"  # as of a source tree on PYTHONPATH


def test_help_needs_no_torch(command: Command) -> None:
    done = command("--help", python=("-X", "importtime"))
    assert done.returncode == 0 and "doctor" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "alignx_ds.cli" in imported
    assert not imported & {"torch", "transformers", "deepspeed", "datasets", "sklearn", "matplotlib"}


def test_output_that_nothing_reads_ends_a_verb_quietly(repo_root: Path, tmp_path: Path) -> None:
    """As `alignx-ds world rows | true` does, but the pipe is closed for certain before anything is printed."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    line = [sys.executable, "-m", "alignx_ds", "world", str(tmp_path / "rows"), "--rows", "3"]
    environment = os.environ | {"PYTHONPATH": str(repo_root)}
    done = subprocess.run(line, env=environment, stdout=write_end, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


ENDING = """
import atexit
from alignx_ds import cli

class Kept:
    def __del__(self) -> None:
        print("torn down")

def main() -> int:
    atexit.register(print, "exit handler")
    return 7

kept, cli.main = Kept(), main
cli.run()
"""


def test_exit_handlers_run_and_nothing_is_torn_down(repo_root: Path) -> None:
    command = [sys.executable, "-c", ENDING]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "exit handler\n", "")
