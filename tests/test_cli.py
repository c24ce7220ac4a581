"""The command line in process: bad input costs one line per problem, exit code 2, and nothing on the disk."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignx_ds import cli
from alignx_ds.config.parse import load
from alignx_ds.runs import manifest, outputs
from alignx_ds.runtime import launcher

WriteRecipe = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes | None]]
Refused = Callable[..., list[str]]
PREFIX = "alignx-ds: error: "
pytestmark = pytest.mark.usefixtures("no_launcher")
GOOD = {"instruction": "reverse the words .", "input": "dog cat", "output": "cat dog"}


@pytest.fixture
def refused(
    tmp_path: Path, snapshot: Snapshot, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Runs a command that must be refused, without --dry-run unless it is given; returns its problems."""

    def refuse(*arguments: str | Path) -> list[str]:
        monkeypatch.chdir(tmp_path)
        before = snapshot(tmp_path)
        code = cli.main([str(a) for a in arguments])
        printed = capsys.readouterr()
        assert code == 2
        assert printed.out == ""
        assert snapshot(tmp_path) == before, "nothing is written or overwritten"
        lines = printed.err.splitlines()
        assert lines
        assert all(line.startswith(PREFIX) for line in lines), "one line per problem, and no traceback"
        return [line.removeprefix(PREFIX) for line in lines]

    return refuse


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("verb", ["run", "specialists", "align"])
def test_several_problems_are_reported_at_once(refused: Refused, write_recipe: WriteRecipe, verb: str) -> None:
    wrong = ("align.ep_size=3", "axes.helpful.train=nowhere.json", "align.deepspeed=ds_configs/stage1_zero3.json")
    found = refused(verb, write_recipe(*wrong))
    assert {line.split(":")[0] for line in found} == {key.split("=")[0] for key in wrong}
    assert any("align.ep_size: got 3" in line and "choose one of 1, 2, 4" in line for line in found)
    assert any("axes.helpful.train: got 'nowhere.json'" in line for line in found)
    assert any("align.deepspeed" in line and "ZeRO stage 3" in line for line in found)


def test_settings_that_do_not_fit_two_ranks_are_all_refused(
    refused: Refused, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command itself, before it starts them."""
    monkeypatch.setattr(launcher, "start_ranks", lambda *_: pytest.fail("ranks are started"))
    wrong = ("align.ep_size=3", "align.deepspeed=ds_configs/stage1_zero3.json", "axes.honest.train=nowhere.csv")
    found = refused("run", write_recipe("launch.ranks=2", *wrong))
    for key in ("align.ep_size", "align.deepspeed", "axes.honest.train"):
        assert any(line.startswith(f"{key}:") for line in found)


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([{"instruction": "a", "input": ""}] * 2, ["row 1", "'output'"]),
        ([GOOD | {"output": " "}] * 3, ["(helpful)", "no usable row to train on of 3 records (3 × empty output)"]),
        ([GOOD, GOOD | {"input": 3}], ["row 2", "'input'", "int"]),
        ([GOOD, ["a", "b"]], ["row 2", "list"]),
        ([], ["no usable row"]),
        ([GOOD | {"instruction": "a lone surrogate \ud800", "input": str(n)} for n in range(40)], ["row 1"]),
        ([GOOD | {"input": "word " * 200}], ["all 1 rows are longer than model.max_length=96"]),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    refused: Refused, write_recipe: WriteRecipe, tmp_path: Path, rows: list[Any], named: list[str]
) -> None:
    path = write_rows(tmp_path / "rows.json", rows)
    (line,) = refused("run", write_recipe(f"axes.helpful.train={path}"))
    for part in (str(path), *named):
        assert part in line


@pytest.mark.parametrize("share", [0.0001, 0.9999])
def test_a_split_that_leaves_no_row_on_one_side_is_refused(
    refused: Refused, write_recipe: WriteRecipe, share: float
) -> None:
    (line,) = refused("run", write_recipe(f"data.calibration_share={share}"), "--dry-run")
    assert "no row is left" in line


def test_another_runs_directory_is_left_alone(refused: Refused, write_recipe: WriteRecipe) -> None:
    out = outputs.claim(load(write_recipe("seed=9")))
    out.model.mkdir()
    manifest.write(out.model, {"seed": 9}, {})
    for options in ([], ["--dry-run"]):
        (line,) = refused("run", write_recipe(), *options)
        assert "output" in line
        assert "another seed" in line


def test_a_directory_that_another_run_is_using_is_left_alone(
    refused: Refused, write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe()
    with outputs.Outputs.of(load(recipe)).lock as lock:
        lock.take()
        (line,) = refused("run", recipe)
        assert "another run holds it (process" in line
        assert [path.name for path in lock.path.parent.iterdir()] == [lock.path.name]
        assert cli.main(["run", str(recipe), "--dry-run"]) == 0, "it only looks"
    assert "nothing is written" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml"])
def test_a_directory_with_foreign_files_is_left_alone(
    refused: Refused, write_recipe: WriteRecipe, tmp_path: Path, name: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("years of work")
    (line,) = refused("run", write_recipe())
    assert str(tmp_path / "run") in line


def test_foreign_files_where_specialists_would_go_are_left_alone(
    refused: Refused, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    (tmp_path / "mine/helpful").mkdir(parents=True)
    (tmp_path / "mine/helpful/thesis.tex").write_text("years of work")
    (line,) = refused("run", write_recipe(f"specialists={tmp_path / 'mine'}"), "--dry-run")
    assert "specialists" in line


def test_other_verbs_say_what_is_wrong_too(refused: Refused, tmp_path: Path, repo_root: Path) -> None:
    assert "no aligned model" in refused("generate", tmp_path, "hello")[0]
    assert "no aligned model" in refused("generate", repo_root / "alignx_ds/models/assets/world-base", "hello")[0]


@pytest.mark.parametrize(("target", "rows"), [("rows", "0"), ("rows", "-1"), ("a file", "3")])
def test_the_worlds_rows_need_a_directory_and_a_number(
    refused: Refused, tmp_path: Path, target: str, rows: str
) -> None:
    (tmp_path / "a file").write_text("mine")
    refused("world", tmp_path / target, "--rows", rows)


def test_the_worlds_rows_are_written_once(refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["world", str(tmp_path / "rows"), "--rows", "5"]) == 0
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(str(p) for p in (tmp_path / "rows").iterdir())
    assert "exists already" in refused("world", tmp_path / "rows", "--rows", "5")[0]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["run"],
        ["run", "r.yaml", "--fast"],
        ["run", "r.yaml", "--show-config"],  # without --dry-run
        ["generate", "m"],
        ["doctor", "runs", "more"],
    ],
)
def test_a_malformed_command_shows_its_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: alignx-ds" in capsys.readouterr().err


def test_every_verb_has_help_and_work(capsys: pytest.CaptureFixture[str]) -> None:
    (verbs,) = [action.choices for action in cli.parser()._actions if isinstance(action.choices, dict)]
    assert len(verbs) == 19
    for verb, made in verbs.items():
        assert made.get_default("work") or verb == "data"  # its `preview` has one
        with pytest.raises(SystemExit) as stop:
            cli.main([verb, "--help"])
        assert stop.value.code == 0
        assert f"usage: alignx-ds {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("torch_is_loaded", [True, False])
def test_ctrl_c_in_any_verb_is_one_line(
    torch_is_loaded: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also while torch is imported: it can't be imported again then."""

    def interrupted(arguments: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("alignx_ds.config.arguments._list", interrupted)
    if not torch_is_loaded:
        monkeypatch.delitem(sys.modules, cli.DISTRIBUTED)
    assert cli.main(["recipes"]) == 130
    assert capsys.readouterr().err == "alignx-ds: error: interrupted\n"


def test_options_may_stand_between_overrides() -> None:
    args = cli.parse(["run", "r.yaml", "a=1", "--dry-run", "b=2"])
    assert (args.overrides, args.dry_run) == (["a=1", "b=2"], True)
    args = cli.parse(["explain", "runs/world", "one", "--json", "two"])
    assert (args.prompts, args.json) == (["one", "two"], True)
