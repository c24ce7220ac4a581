"""`alignx-ds data select`: what goes, why, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from alignx_ds import cli
from alignx_ds.config import parse
from alignx_ds.data.inputs import read_inputs
from alignx_ds.models.base import WORLD_BASES
from alignx_ds.plan import checks

WriteRecipe = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes | None]]
pytestmark = pytest.mark.usefixtures("no_launcher")
THINGS = "salt bread water wine honey oil rice corn milk tea soup cake meat fish fruit seeds nuts eggs ham".split()
QUESTIONS = [f"where can the {verb} {thing} be" for thing in THINGS for verb in ("old", "new")]


@pytest.fixture
def recipe(write_recipe: WriteRecipe, tmp_path: Path) -> Path:
    """One axis with a file of its own: each question, and one of them again with other words around it."""
    records = [{"instruction": q, "input": "", "output": "i am well ."} for q in QUESTIONS]
    source = tmp_path / "rows.json"
    source.write_text(json.dumps([*records, {**records[0], "instruction": QUESTIONS[0] + " ?"}]), encoding="utf-8")
    path = write_recipe()
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    values["axes"] = {"kind": {"prompt": "", "schema": "alpaca", "train": [{"source": str(source)}]}}
    del values["generalist"]
    OmegaConf.save(OmegaConf.create(values), path)
    return path


def trained_on(recipe: Path, *overrides: str) -> list[str]:
    config = parse.load(str(recipe), list(overrides))
    inputs = read_inputs(config, checks.check(config, 1, weights=False))
    return [row.prompt for row in inputs.data.splits.train["kind"].rows]


def test_a_copy_without_near_duplicates_trains_on_the_rest(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = trained_on(recipe, "data.decontaminate=false")
    twins = {QUESTIONS[0], QUESTIONS[0] + " ?"}
    assert twins <= set(before), "neither is held out"
    out = tmp_path / "out"
    assert cli.main(["data", "select", str(recipe), "--out", str(out), "data.decontaminate=false"]) == 0
    said = capsys.readouterr().out
    assert "rows.json, row 39" in said and "cosine 1.000 with" in said
    (gone,) = map(json.loads, (out / "left-out.jsonl").read_text(encoding="utf-8").splitlines())
    assert gone["question"] == QUESTIONS[0] + " ?" and gone["rows"] == [f"{tmp_path / 'rows.json'}, row 39"]
    values = OmegaConf.load(recipe)
    values.axes.kind.train = [{"source": str(out / "kind-0.jsonl"), "schema": "alpaca"}]
    OmegaConf.save(values, recipe)
    after = trained_on(recipe, "data.decontaminate=false")
    assert after == [prompt for prompt in before if prompt != QUESTIONS[0] + " ?"]
    assert len((out / "kind-0.jsonl").read_text(encoding="utf-8").splitlines()) == len(QUESTIONS)


def test_without_a_directory_nothing_is_written(recipe: Path, tmp_path: Path, snapshot: Snapshot) -> None:
    before = snapshot(tmp_path)
    assert cli.main(["data", "select", str(recipe)]) == 0
    assert snapshot(tmp_path) == before


def test_the_best_by_a_scorer_of_the_users_own(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_scorers.py").write_text(
        "def late(rows): return [THINGS.index(r.prompt.split()[4]) for r in rows]\n"
        "def twice(rows): return [2] * len(rows)\n"
        "def short(rows): return [1.0]\n"
        "def odd(rows): return [float('nan')] * len(rows)\n"
        f"THINGS = {THINGS!r}\n"
    )
    monkeypatch.chdir(tmp_path)
    chosen = ["data", "select", str(recipe), "--most", "4", "--similar", "1", "--rows", "100"]
    assert cli.main([*chosen, "--scorer", "my_scorers:late", "--scorer", "my_scorers:twice"]) == 0
    said = capsys.readouterr().out
    assert "(score 0): where can the old salt be" in said and "not among the best" in said
    kept = [q for q in trained_on(recipe) if f": {q}\n" not in said]
    assert kept and {q.split()[4] for q in kept} <= set(THINGS[-4:])
    for name, why in (
        ("short", "it returned 1 for"),
        ("odd", "one is not finite"),
        ("none", "has no attribute 'none'"),
    ):
        assert cli.main([*chosen, "--scorer", f"my_scorers:{name}"]) == 2
        assert why in capsys.readouterr().err
    assert cli.main([*chosen, "--scorer", "no_such_module:f"]) == 2
    assert "--scorer: got 'no_such_module:f'" in capsys.readouterr().err


def test_a_sentence_encoder_of_the_users_own(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any model with states: here the world's base model, whose vocabulary ignores the question mark least."""
    base = str(next(iter(WORLD_BASES.values())))
    assert cli.main(["data", "select", str(recipe), "--encoder", base, "--similar", "0.999"]) == 0
    assert "kind" in capsys.readouterr().out
    assert cli.main(["data", "select", str(recipe), "--encoder", "/nowhere/at/all"]) == 2
    assert capsys.readouterr().err.startswith("alignx-ds: error: --encoder: got '/nowhere/at/all'")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--similar", "0"], "--similar: got 0"),
        (["--most", "-1"], "--most: got -1"),
        (["--axes", "other"], "--axes: got 'other', expected some of kind"),
    ],
)
def test_wrong_options_are_one_line(
    recipe: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "select", str(recipe), *options]) == 2
    assert f"alignx-ds: error: {said}" in capsys.readouterr().err


def test_generated_rows_are_refused(write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "select", str(write_recipe())]) == 2
    assert "its rows are generated" in capsys.readouterr().err
