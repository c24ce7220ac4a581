"""AlpacaEval's published win rates from its published files, and files that go out and come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import DATA, needs

from alignx_ds.data.rows import Row
from alignx_ds.errors import DataError
from alignx_ds.evaluation import alpaca_eval
from alignx_ds.evaluation.alpaca_eval import (
    Output,
    WinRate,
    annotate,
    model_outputs,
    read_annotations,
    read_reference,
    reference_of,
    win_rate,
)

FILES = DATA / "alpaca_eval"
BINARY = FILES / "alpaca-7b__alpaca_eval_gpt4__annotations.json"
WEIGHTED = FILES / "alpaca-7b__weighted_alpaca_eval_gpt4_turbo__annotations_trimmed.json"
REFERENCE = FILES / "text_davinci_003_reference_outputs_from_annotations.json"

published = needs(BINARY, WEIGHTED, REFERENCE)
ANNOTATION = {"instruction": "i", "generator_1": "a", "generator_2": "b", "annotator": "c", "preference": 1}
REFERENCE_ROW = {"dataset": "d", "instruction": "i", "output": "o", "generator": "g"}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@published
@pytest.mark.parametrize(("path", "leaderboard"), [(BINARY, (26.4596, 1.5357)), (WEIGHTED, (2.5915, 0.4871))])
def test_the_leaderboards_win_rates_of_alpaca_7b(path: Path, leaderboard: tuple[float, float]) -> None:
    result = win_rate(a.preference for a in read_annotations(path))
    assert (round(result.win_rate, 4), round(result.standard_error, 4)) == leaderboard
    assert (result.n, result.dropped) == (805, 0)

    raw = np.array([record["preference"] for record in json.loads(path.read_text(encoding="utf-8"))], dtype=np.float64)
    wins = np.where(raw == 0, 0.5, raw - 1)
    assert result.win_rate == pytest.approx(100 * wins.mean(), abs=1e-6)
    assert result.standard_error == pytest.approx(100 * wins.std(ddof=1) / np.sqrt(len(wins)), abs=1e-6)


@published
def test_the_published_references_have_no_repeats_and_keep_their_spaces() -> None:
    references = read_reference(REFERENCE)
    records = json.loads(REFERENCE.read_text(encoding="utf-8"))
    assert len(references) == len(records) == 805
    spaced = [r["instruction"] for r in records if r["instruction"] != r["instruction"].strip()]
    assert spaced, "the package matches them to the letter, so the export must not strip them"
    for instruction in spaced:
        assert reference_of(Row(instruction.strip(), ""), references).instruction == instruction


@published
def test_the_published_files_go_out_as_they_came_in(tmp_path: Path) -> None:
    """The model's published outputs as our answers: the same records that the published annotator saw and wrote."""
    records = json.loads(BINARY.read_text(encoding="utf-8"))
    references = read_reference(REFERENCE)
    rows = [Row(r["instruction"].strip(), "") for r in records]
    outputs = model_outputs(rows, [r["output_2"] for r in records], references, "alpaca-7b")
    alpaca_eval.write(tmp_path / "model_outputs.json", outputs)
    assert json.loads((tmp_path / "model_outputs.json").read_text(encoding="utf-8")) == [
        {"dataset": r["dataset"], "instruction": r["instruction"], "output": r["output_2"], "generator": "alpaca-7b"}
        for r in records
    ]
    baselines = [reference_of(row, references) for row in rows]
    preferences = [r["preference"] for r in records]
    alpaca_eval.write(tmp_path / "annotations.json", annotate(baselines, outputs, preferences, records[0]["annotator"]))
    kept = ("instruction", "output_1", "generator_1", "output_2", "generator_2", "annotator", "preference")
    assert json.loads((tmp_path / "annotations.json").read_text(encoding="utf-8")) == [
        {name: r[name] for name in kept} for r in records
    ]
    assert read_annotations(tmp_path / "annotations.json") == read_annotations(BINARY)


def test_the_formula_by_hand() -> None:
    assert win_rate([1, 2, 2, 2]) == WinRate(75.0, 25.0, 4, 0)
    assert win_rate([0, 0, 1.5]) == WinRate(50.0, 0.0, 3, 0), "both ways to write a draw"
    assert win_rate([None, 2, None, 1]) == WinRate(50.0, 50.0, 2, 2), "what is not known is neither win nor loss"
    assert win_rate([2]) == WinRate(100.0, 0.0, 1, 0)
    assert win_rate([None]) == WinRate(0.0, 0.0, 0, 1)


@given(st.lists(st.floats(1, 2), min_size=2))
def test_swapping_model_and_baseline_mirrors_the_win_rate(preferences: list[float]) -> None:
    ours, theirs = win_rate(preferences), win_rate([3 - p for p in preferences])
    assert ours.win_rate + theirs.win_rate == pytest.approx(100)
    assert ours.standard_error == pytest.approx(theirs.standard_error, abs=1e-9)


def test_annotations_keep_null_and_fractions(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [ANNOTATION | {"preference": p} for p in (None, 1.25, 0)])
    assert [a.preference for a in read_annotations(path)] == [None, 1.25, 0]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({k: v for k, v in ANNOTATION.items() if k != "preference"}, "no column 'preference'"),
        ({k: v for k, v in ANNOTATION.items() if k != "annotator"}, "no column 'annotator'"),
        (ANNOTATION | {"preference": 0.5}, "column 'preference' is 0.5"),
        (ANNOTATION | {"preference": True}, "column 'preference' is True"),
        (ANNOTATION | {"output_2": None}, "column 'output_2' is NoneType"),
        (ANNOTATION | {"instruction": " "}, "column 'instruction' is empty"),
        (ANNOTATION | {"output_1": "\ud800"}, "column 'output_1' is not valid Unicode"),
        (["i"], "got list"),
    ],
)
def test_a_bad_annotation_is_named(tmp_path: Path, row: Any, complaint: str) -> None:
    path = write(tmp_path / "annotations.json", [ANNOTATION, row])
    with pytest.raises(DataError) as error:
        read_annotations(path)
    assert f"{path}, row 2: " in str(error.value) and complaint in str(error.value)


@pytest.mark.parametrize("text", ["", "{", '{"instruction": "i"}'])
def test_a_file_that_is_no_list(tmp_path: Path, text: str) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(text, encoding="utf-8")
    for read in (read_annotations, read_reference):
        with pytest.raises(DataError, match=r"annotations\.json: (not JSON|expected a JSON list)"):
            read(path)


def test_a_repeated_reference_has_one_output(tmp_path: Path) -> None:
    same = [REFERENCE_ROW, REFERENCE_ROW | {"instruction": " i\n"}]
    assert list(read_reference(write(tmp_path / "same.json", same)).values()) == [Output("d", "i", "o", "g")]
    for column in ("output", "generator"):
        path = write(tmp_path / f"{column}.json", [*same, REFERENCE_ROW | {column: "another"}])
        with pytest.raises(DataError, match=r"row 3: column 'instruction'"):
            read_reference(path)


def test_a_reference_file_needs_outputs(tmp_path: Path) -> None:
    bare = {k: v for k, v in REFERENCE_ROW.items() if k != "dataset"}
    assert read_reference(write(tmp_path / "bare.json", [bare]))["i"] == Output("", "i", "o", "g")
    with pytest.raises(DataError, match="no reference outputs"):
        read_reference(write(tmp_path / "empty.json", []))
    with pytest.raises(DataError, match="row 1: no column 'output'"):
        read_reference(write(tmp_path / "lacking.json", [{"instruction": "i", "generator": "g"}]))


def test_a_row_without_a_reference_is_named() -> None:
    with pytest.raises(DataError, match=r"held\.json, row 7: no reference output for the instruction 'who \?'"):
        reference_of(Row("who ?", "", place="held.json, row 7"), {"what ?": Output("d", "what ?", "o", "g")})
