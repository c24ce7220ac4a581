"""Directories in which the commands of the pages can be run, and a tiny run for them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import in_this_process

SHOWN = (
    "launch",
    "docs",
    "ds_configs",
    "benchmarks",
    "tests",
    "alignx_ds",
    "Makefile",
    "pyproject.toml",
    "requirements.lock",
)
Shell = Callable[..., str]
Workplace = Callable[[], Path]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Workplace:
    """Makes a directory that looks like the project after `make install`, with its own `runs/`."""

    def make() -> Path:
        place = tmp_path_factory.mktemp("docs")
        for name in SHOWN:
            (place / name).symlink_to(repo_root / name)
        programs = place / ".venv/bin"
        programs.mkdir(parents=True)
        for name, start in (("python", ""), ("alignx-ds", "-m alignx_ds ")):
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {start}"$@"\n')
            (programs / name).chmod(0o755)
        (place / "runs").mkdir()
        return place

    return make


@pytest.fixture(scope="session")
def shell() -> Shell:
    """Runs a line of a page, with the project's programs on the path; returns its output."""

    def run(line: str, place: Path, *more: str) -> str:
        outside = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
        environment = outside | {"PATH": f"{place}/.venv/bin:{outside['PATH']}", "PYTHONPATH": str(place)}
        command = ["bash", "-c", " ".join([line, *(f"'{setting}'" for setting in more)])]
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def run_dir(workplace: Workplace) -> Path:
    """The output of the page's command for a fourth axis, made tiny."""
    from pages import SMALL, command_with

    place = workplace()
    _, *arguments = shlex.split(command_with("docs/extending.md", "axes.brief.prompt"))
    done = in_this_process(*arguments, *SMALL, "output=runs/world", place=place)
    assert done.returncode == 0, done.stderr
    return place / "runs/world"


@pytest.fixture(scope="session")
def furnished(workplace: Workplace, run_dir: Path) -> Workplace:
    """Makes a workplace that holds a tiny run, as after `make demo`."""

    def make() -> Path:
        place = workplace()
        for name in ("world", "mine"):
            shutil.copytree(run_dir, place / "runs" / name)
        return place

    return make
