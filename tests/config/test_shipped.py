"""Shipped recipes are known by name, listed, and copied with what they refer to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alignx_ds import cli
from alignx_ds.config import parse, shipped
from alignx_ds.training.engine import read_template

pytestmark = pytest.mark.usefixtures("no_launcher")
Snapshot = Callable[[Path], dict[str, bytes | None]]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_bare_name_is_a_shipped_recipe_unless_a_file_has_it(repo_root: Path, tmp_path: Path) -> None:
    assert parse.load("world", ["seed=3"]) == parse.load(repo_root / "launch/recipes/world.yaml", ["seed=3"])
    (tmp_path / "world").mkdir()  # no file
    assert parse.load("world").model.path == "world"
    (tmp_path / "gemma-7b").write_text((repo_root / "launch/recipes/world.yaml").read_text(encoding="utf-8"))
    assert parse.load("gemma-7b").model.path == "world"


def test_they_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str], repo_root: Path) -> None:
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(p.stem for p in repo_root.glob("launch/recipes/*.yaml"))
    assert all(line.endswith(".") and len(line) <= 120 for line in lines)


def test_a_copy_runs_with_its_own_files_from_any_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["recipes", "copy", "world", "my copy"]) == 0
    copied = capsys.readouterr().out.splitlines()
    assert sorted(copied) == sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*"))
    changed = tmp_path / "my copy/ds_configs/stage1_zero3.json"
    content = json.loads(changed.read_text()) | {"steps_per_print": 7}
    changed.write_text(json.dumps(content))
    config = parse.load("my copy/world.yaml")
    assert read_template(config.train.deepspeed, "train.deepspeed") == content
    assert read_template(parse.load("world").train.deepspeed, "train.deepspeed") != content
    assert cli.main(["run", "my copy/world.yaml", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["recipes", "copy", "wrld"], "NAME: got 'wrld', expected one of deepseek-llm-7b, "),
        (["recipes", "copy", "world", "full"], "full/world.yaml exists already"),
        (["recipes", "copy", "world", "full/world.yaml"], "DEST: got 'full/world.yaml', expected a directory"),
        (["run", "launch/recipes/world.yaml"], "did you mean the shipped recipe 'world'?"),
        (["run", "wrld"], "expected a YAML file, or a recipe that `alignx-ds recipes` lists"),
        (["run", "n" * 5000], "expected a YAML file"),
    ],
)
def test_what_is_not_there_or_in_the_way_costs_a_line(
    arguments: list[str], told: str, tmp_path: Path, snapshot: Snapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/world.yaml").write_text("mine")
    before = snapshot(tmp_path)
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert snapshot(tmp_path) == before


def test_every_recipe_can_be_copied(tmp_path: Path) -> None:
    for name, path in shipped.recipes().items():
        for copied in shipped.copy(name, parse.load(path), tmp_path / name):
            assert copied.is_file()
