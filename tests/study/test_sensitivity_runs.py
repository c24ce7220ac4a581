"""Scores of several runs against one key of their recipes: grouped by value, and runs that differ otherwise refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignx_ds import cli

KEY = "align.steps"
WriteRecipe = Callable[..., Path]
Write = Callable[..., Path]
RUN = {"perplexity": {}, "collapse": {}, "router": {}, "run": {"seed": 0}}


@pytest.fixture
def run(write_recipe: WriteRecipe, tmp_path: Path) -> Write:
    """Writes the recipe and the report of a run; its directory."""

    def write(name: str, score: float, *overrides: str, scored: tuple[str, ...] = ("a", "b")) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        shutil.copy(write_recipe(f"output={directory}", "align.warmup_steps=0", *overrides), directory / "config.yaml")
        systems = {system: {"a": score, "b": score / 2, "avg": 0.75 * score} for system in ("base", "alignx")}
        content = RUN | {"scored": list(scored), "systems": systems}
        (directory / "report.json").write_text(json.dumps(content))
        return directory

    return write


def test_values_are_in_order_and_seeds_are_one_point(run: Write, tmp_path: Path) -> None:
    runs = [run("x", 90.0, f"{KEY}=80"), run("y", 40.0, f"{KEY}=9"), run("z", 70.0, f"{KEY}=80", "seed=1")]
    out = tmp_path / "out"
    assert cli.main(["study", "sensitivity", *map(str, runs), "--by", KEY, "--out", str(out)]) == 0
    content = json.loads((out / f"sensitivity-{KEY}.json").read_text())
    assert content["values"] == [9, 80] and content["runs"] == [1, 2]
    assert content["command"] == f"alignx-ds study sensitivity x y z --by {KEY}"
    low, high = content["systems"]["alignx"]
    assert low["a"] == {"mean": 40.0, "deviation": 0.0} and low["avg"]["mean"] == 30.0
    assert high["a"]["mean"] == 80.0 and high["b"]["mean"] == 40.0
    assert high["a"]["deviation"] == pytest.approx(200**0.5)
    assert (out / f"sensitivity-{KEY}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "scored", "key", "said"),
    [
        ([], ("a", "b"), KEY, "--by: got 'align.steps', expected a key in which the runs differ"),
        ([], ("a", "b"), "align.stairs", "--by: got 'align.stairs', expected a key of the runs' recipes"),
        ([], ("a", "b"), "model.layers", "--by: got 'model.layers', expected a key of the runs' recipes"),
        (["align.lr=0.3", f"{KEY}=5"], ("a", "b"), KEY, "in align.lr too; compare runs that only differ in"),
        ([f"{KEY}=5"], ("a",), KEY, "in the axes that are scored too"),
    ],
)
def test_runs_that_can_t_be_compared_are_refused_in_one_line(
    changes: list[str],
    scored: tuple[str, ...],
    key: str,
    said: str,
    run: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, other = run("x", 90.0, f"{KEY}=80"), run("y", 40.0, f"{KEY}=80", *changes, scored=scored)
    assert cli.main(["study", "sensitivity", str(one), str(other), "--by", key]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (one / "study").exists()


def test_the_options_belong_to_sensitivity(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "drift", "runs/world", "--by", KEY]) == 2
    assert "--by: only sensitivity" in capsys.readouterr().err
    assert cli.main(["study", "sensitivity", "runs/a", "runs/b"]) == 2
    assert "to compare runs by a setting, give --by" in capsys.readouterr().err
