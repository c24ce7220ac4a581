"""Two constructed runs, one by the scope of its gates each; decisions made by hand are in decisions.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from constructed_runs import SETTINGS, settings_of, write_run

from alignx_ds.models.base import BaseModel
from alignx_ds.runs.finished import FinishedRun


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run's directory by the scope of its gates; in the second the generalist has no rows."""
    root = tmp_path_factory.mktemp("runs")
    found = {}
    for scope in SETTINGS:
        settings = settings_of(scope)
        found[scope] = write_run(settings, BaseModel(settings.model), root / scope)
    return found


@pytest.fixture(params=tuple(SETTINGS))
def run(request: pytest.FixtureRequest, made: dict[str, Path]) -> FinishedRun:
    return FinishedRun.open(made[request.param])


@pytest.fixture(scope="session")
def needs_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose axes have probabilities of being needed."""
    settings = settings_of("needs")
    return write_run(settings, BaseModel(settings.model), tmp_path_factory.mktemp("needs") / "run")


@pytest.fixture
def copied(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["shared"], tmp_path / "run"))
