"""The published data sets' own rows through the loaders; skipped where they are not at hand."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from alignx_ds import inputs
from alignx_ds.config import RunConfig
from alignx_ds.data.rows import split
from alignx_ds.data.sources import load
from alignx_ds.errors import DataError
from alignx_ds.specialists.base import BaseModel

DATA = Path(os.environ.get("ALIGNX_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
ALPACA = DATA / "alpaca/alpaca_cleaned_random2000.json"
ALPACA_ORIGINAL = DATA / "alpaca/alpaca_original_cherry3111.json"
BEAVERTAILS = DATA / "beavertails/beavertails_30k_test_first2021.jsonl"
TRUTHFULQA = DATA / "truthfulqa/TruthfulQA.csv"
ALL = 10**6

pytestmark = pytest.mark.skipif(
    not all(path.is_file() for path in (ALPACA, ALPACA_ORIGINAL, BEAVERTAILS, TRUTHFULQA)),
    reason="the public samples are not in ../shared/data; set ALIGNX_DATA to their directory",
)


def json_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text) if path.suffix == ".json" else [*map(json.loads, text.splitlines())]
    return rows


@pytest.mark.parametrize(("path", "count"), [(ALPACA, 2000), (ALPACA_ORIGINAL, 3111)])
def test_alpaca(path: Path, count: int) -> None:
    rows = load(str(path), "alpaca", held_out=False, limit=ALL, seed=0).rows
    assert len(rows) == count
    for row, record in zip(rows, json_rows(path), strict=True):
        assert row.prompt.startswith(record["instruction"].strip())
        assert row.response == record["output"].strip()


def test_alpacas_markers_of_an_absent_input_are_no_text() -> None:
    """Some of the original's inputs say "<noinput>" or "noinput" where the others are empty."""
    marked = {"noinput", "<noinput>", "no input"}
    absent = [r["instruction"].strip() for r in json_rows(ALPACA_ORIGINAL) if r["input"].strip().lower() in marked]
    prompts = {row.prompt for row in load(str(ALPACA_ORIGINAL), "alpaca", held_out=False, limit=ALL, seed=0).rows}
    assert absent
    assert set(absent) <= prompts


def test_beavertails_trains_on_its_safe_answers() -> None:
    records = json_rows(BEAVERTAILS)
    rows = load(str(BEAVERTAILS), "beavertails", held_out=False, limit=ALL, seed=0).rows
    assert len(records) == 2021
    assert [(row.prompt, row.response) for row in rows] == [
        (r["prompt"].strip(), r["response"].strip()) for r in records if r["is_safe"]
    ]
    assert len(rows) == 842


def test_beavertails_judges_each_prompt_once() -> None:
    records = json_rows(BEAVERTAILS)
    rows = load(str(BEAVERTAILS), "beavertails", held_out=True, limit=ALL, seed=0).rows
    assert {row.prompt for row in rows} == {r["prompt"].strip() for r in records}
    assert len({row.prompt for row in rows}) == len(rows)
    harmful = {r["prompt"].strip() for r in records if any(r["category"].values())}  # is_safe: no category is true
    assert {row.prompt for row in rows if row.harmful} == harmful


def test_truthfulqa() -> None:
    rows = load(str(TRUTHFULQA), "truthfulqa", held_out=True, limit=ALL, seed=0).rows
    with TRUTHFULQA.open(encoding="utf-8-sig", newline="") as file:
        records = list(csv.DictReader(file))
    assert len(rows) == len(records) == 817
    for row, record in zip(rows, records, strict=True):
        assert row.response == record["Best Answer"].strip() == row.correct[0]
        assert set(row.correct[1:]) == {a.strip() for a in record["Correct Answers"].split(";")} - {""}
        assert set(row.incorrect) == {a.strip() for a in record["Incorrect Answers"].split(";")} - {""}


def test_a_split_by_question_leaves_about_its_share() -> None:
    rows = load(str(BEAVERTAILS), "beavertails", held_out=False, limit=ALL, seed=0).rows
    kept, back = split(rows, 0.15)
    assert not {r.prompt for r in kept} & {r.prompt for r in back}
    assert len(back) / len(rows) == pytest.approx(0.15, abs=0.05)


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def real_config(tiny_config: RunConfig, tmp_path: Path) -> RunConfig:
    """Three real axes and a generalist of plain lines; every other row is held out."""
    with TRUTHFULQA.open(encoding="utf-8-sig", newline="") as file:
        questions: list[dict[str, Any]] = list(csv.DictReader(file))
    sources = {"helpful": json_rows(ALPACA), "honest": questions}
    for axis, rows in sources.items():
        for part, start in (("train", 0), ("held_out", 1)):
            path = write_json(tmp_path / f"{axis}.{part}.json", rows[start::2])
            setattr(tiny_config.axes[axis], part, str(path))
    by_question = json_rows(BEAVERTAILS)
    prompts = sorted({r["prompt"].strip() for r in by_question})
    for part, chosen in (("train", set(prompts[::2])), ("held_out", set(prompts[1::2]))):
        rows = [r for r in by_question if r["prompt"].strip() in chosen]
        setattr(tiny_config.axes["harmless"], part, str(write_json(tmp_path / f"harmless.{part}.json", rows)))
    tiny_config.model.max_length = 4096
    return tiny_config


def test_a_run_reads_real_rows_of_all_three_axes(real_config: RunConfig, world_base: BaseModel) -> None:
    """The world's model is too small for them; its tokenizer still reads every row from end to end."""
    data = inputs.read(real_config, world_base)
    assert {axis: len(rows) for axis, rows in data.injected.items()} == dict.fromkeys(real_config.axes, 60)
    assert {axis: len(rows) for axis, rows in data.held_out.items()} == dict.fromkeys(real_config.axes, 20)
    assert len(data.train.examples) + len(data.kept_back.examples) == 60 * len(real_config.expert_names)


def test_held_out_questions_may_not_be_trained_on(real_config: RunConfig, world_base: BaseModel) -> None:
    real_config.axes["honest"].held_out = real_config.axes["honest"].train
    with pytest.raises(DataError, match=r"honest\.train\.json: 20 questions are in .*honest\.train\.json too"):
        inputs.read(real_config, world_base)
