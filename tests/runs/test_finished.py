"""A finished run, opened: what it holds wherever it lies, what is refused, and which fine-tunes are its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from alignx_ds.errors import ConfigError, DataError, UserError
from alignx_ds.runs import manifest
from alignx_ds.runs.finished import FinishedRun

AXES = ["helpful", "harmless", "honest"]


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    unused = shutil.ignore_patterns("checkpoints", "tensorboard", "answers", "verdicts", "likelihoods", "plots")
    return Path(shutil.copytree(finished_run, tmp_path / "run", ignore=unused))


def test_it_is_found_where_it_has_been_moved_to(copied: Path) -> None:
    run = FinishedRun.open(copied)
    assert run.experts == ["generalist", *AXES] and run.axes == AXES
    assert run.config.output == str(copied) and run.out.model == copied / "model"
    assert [run.specialist(axis) for axis in AXES] == [copied / "specialists" / axis for axis in AXES]
    assert run.report is not None and next(iter(run.report["systems"])) == "base"


def test_after_align_alone_there_is_no_report(copied: Path) -> None:
    report = json.loads((copied / "report.json").read_text())
    (copied / "report.json").write_text(json.dumps(report | {"model": "made again since"}))
    assert FinishedRun.open(copied).report is None, "it is about another model"
    (copied / "report.json").unlink()
    assert FinishedRun.open(copied).report is None
    (copied / "report.json").write_text("{}")
    with pytest.raises(DataError, match=r"report\.json: not the report of a run"):
        _ = FinishedRun.open(copied).report


def test_shared_specialists_are_found_where_the_config_says(copied: Path) -> None:
    shared = (copied / "specialists").rename(copied.parent / "shared")
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("specialists: ''", f"specialists: {shared}"))
    assert FinishedRun.open(copied).specialist("honest") == shared / "honest"


def _swap_axes(run: Path) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["axes"] = dict(reversed(content["axes"].items()))
    (run / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def _plain_model(run: Path) -> None:
    path = run / "model/config.json"
    path.write_text(json.dumps({"model_type": "llama"}))
    content = manifest.read(run / "model")
    content["files"]["config.json"] = manifest.file_hash(path)
    (run / "model" / manifest.NAME).write_text(manifest.sealed(content))


def _flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


REFUSED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no such directory": (shutil.rmtree, ".", "no such directory"),
    "a file": (lambda run: None, "config.yaml", "no such directory"),
    "its model's directory": (lambda run: None, "model", "directory above it"),
    "no config": (lambda run: (run / "config.yaml").unlink(), ".", "no config.yaml"),
    "stage 2 unfinished": (lambda run: (run / "model/manifest.json").unlink(), ".", "not finished stage 2"),
    "a file is missing": (lambda run: (run / "model/model.safetensors").unlink(), ".", "differs from its manifest"),
    "a bit has flipped": (lambda run: _flip(run / "model/model.safetensors"), ".", "differs from its manifest"),
    "other axes": (_swap_axes, ".", "restore config.yaml"),
    "another model": (_plain_model, ".", "not an aligned model's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_finished_run_is_refused(copied: Path, case: str) -> None:
    damage, given, named = REFUSED[case]
    damage(copied)
    with pytest.raises(UserError, match=named) as error:
        FinishedRun.open(copied / given)
    assert str(copied) in str(error.value)
    if isinstance(error.value, ConfigError):
        assert str(error.value).startswith("RUN_DIR: got ")


def test_specialists_that_are_missing_damaged_or_of_another_run_are_refused(copied: Path) -> None:
    run, specialists = FinishedRun.open(copied), copied / "specialists"
    shutil.rmtree(specialists / "helpful")
    shutil.copytree(specialists / "honest", specialists / "helpful")
    _flip(next((specialists / "harmless").glob("*.safetensors")))
    shutil.rmtree(specialists / "honest")
    refused = {
        "helpful": "made by another run",
        "harmless": "differs from its manifest",
        "honest": "not there, or not finished",
    }
    for name, named in refused.items():
        with pytest.raises(DataError, match=named):
            run.specialist(name)
