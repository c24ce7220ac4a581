"""A small finished run, opened for the studies, and the result of each study of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignx_ds import cli
from alignx_ds.study.studied_run import StudiedRun


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def studied_run(finished_run: Path) -> StudiedRun:
    return StudiedRun.open(finished_run)


@pytest.fixture
def without_a_judge_of_harm(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run whose harmless axis is judged by refusals alone."""
    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    config = tmp_path / "run" / "config.yaml"
    config.write_text(re.sub(r"judge: safety", "judge: refusal", config.read_text()))
    return tmp_path / "run"


@pytest.fixture(scope="session")
def study(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The JSON of a study of the finished run; each study is made once."""
    out = tmp_path_factory.mktemp("studies")

    def result(what: str) -> dict[str, Any]:
        if not (out / f"{what}.json").exists():
            assert cli.main(["study", what, str(finished_run), "--out", str(out)]) == 0
            assert (out / f"{what}.png").read_bytes().startswith(b"\x89PNG")
            assert (out / f"{what}.pdf").read_bytes().startswith(b"%PDF")
        content: dict[str, Any] = json.loads((out / f"{what}.json").read_text())
        return content

    return result
