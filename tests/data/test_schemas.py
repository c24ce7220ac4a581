"""The published row schemas: what becomes of a record, and which file, row and column an error names."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from alignx_ds.data.rows import Record, Row
from alignx_ds.data.schemas import SCHEMAS, check_columns, read_records
from alignx_ds.errors import DataError

GOOD: dict[str, Record] = {
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "beavertails": {"prompt": "How?", "response": "So.", "category": {"self_harm": False}, "is_safe": True},
    "truthfulqa": {
        "Question": "Why?",
        "Best Answer": "So.",
        "Correct Answers": "So.; Thus.",
        "Incorrect Answers": "No.",
    },
    "plain": {"prompt": "Hello", "response": "Hi"},
}
COLUMNS = [(schema, column) for schema, record in GOOD.items() for column in record]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def placed(*records: Record) -> list[tuple[str, Record]]:
    return [(f"rows.json, row {n}", record) for n, record in enumerate(records, start=1)]


def answer(prompt: str, response: str, is_safe: bool) -> Record:
    return {"prompt": prompt, "response": response, "category": {}, "is_safe": is_safe}


@pytest.mark.parametrize(
    ("given_input", "prompt"), [("", "Add."), ("  ", "Add."), ("1 2", "Add.\n1 2"), (" 1 2\n", "Add.\n1 2")]
)
def test_alpaca_joins_instruction_and_input(given_input: str, prompt: str) -> None:
    record = {"instruction": " Add. ", "input": given_input, "output": " 3\n"}
    assert SCHEMAS["alpaca"].parse(placed(record)) == [Row(prompt, "3")]


def test_beavertails_imitates_only_safe_answers() -> None:
    records = placed(answer("a", "bad", False), answer("a", "good", True), answer("b", "fine", True))
    assert SCHEMAS["beavertails"].parse(records) == [Row("a", "good", harmful=True), Row("b", "fine", harmful=False)]


def test_beavertails_held_out_has_one_row_a_prompt() -> None:
    records = placed(
        answer("a", "bad", False), answer("a", "good", True), answer("b", "fine", True), answer("c", "bad", False)
    )
    rows = SCHEMAS["beavertails"].parse_held_out(records)
    assert rows == [Row("a", "good", harmful=True), Row("b", "fine"), Row("c", "", harmful=True)]


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), min_size=1, max_size=12))
def test_a_prompt_is_harmful_when_any_of_its_answers_is_unsafe(answers: list[tuple[str, bool]]) -> None:
    """In whatever order the answers come, and its reference is a safe answer wherever there is one."""
    rows = SCHEMAS["beavertails"].parse_held_out(placed(*(answer(p, f"{p} {s}", s) for p, s in answers)))
    assert sorted(row.prompt for row in rows) == sorted({p for p, _ in answers})
    for row in rows:
        judged = [safe for prompt, safe in answers if prompt == row.prompt]
        assert row.harmful is (not all(judged))
        assert row.response == (f"{row.prompt} True" if any(judged) else "")


def test_truthfulqa_splits_its_lists() -> None:
    (row,) = SCHEMAS["truthfulqa"].parse(placed(GOOD["truthfulqa"] | {"Correct Answers": " Thus. ;; Hence.;"}))
    assert (row.prompt, row.response) == ("Why?", "So.")
    assert set(row.correct) == {"So.", "Thus.", "Hence."}  # the best answer is a correct one
    assert row.incorrect == ("No.",)


@pytest.mark.parametrize(("schema", "column"), COLUMNS)
def test_a_missing_column_is_named_with_file_and_row(schema: str, column: str) -> None:
    broken = {key: value for key, value in GOOD[schema].items() if key != column}
    with pytest.raises(DataError, match=rf"^rows\.json, row 2: .*'{column}'"):
        check_columns(placed(GOOD[schema], broken), schema)


@pytest.mark.parametrize(("schema", "column"), COLUMNS)
@pytest.mark.parametrize("value", [3, ["a"], None])
def test_a_column_of_the_wrong_type_is_named(schema: str, column: str, value: Any) -> None:
    with pytest.raises(DataError, match=rf"^rows\.json, row 2: .*'{column}'"):
        check_columns(placed(GOOD[schema], GOOD[schema] | {column: value}), schema)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_good_records_pass(schema: str) -> None:
    records = placed(GOOD[schema], GOOD[schema] | {"something else": 1})
    check_columns(records, schema)
    assert len(SCHEMAS[schema].parse(records)) == 2


@pytest.mark.parametrize(
    ("schema", "column"),
    [("alpaca", "instruction"), ("alpaca", "output"), ("beavertails", "response"), ("plain", "prompt")],
)
def test_an_empty_text_is_named_with_file_and_row(schema: str, column: str) -> None:
    with pytest.raises(DataError, match=rf"^rows\.json, row 2: column '{column}' is empty"):
        SCHEMAS[schema].parse(placed(GOOD[schema], GOOD[schema] | {column: " \n"}))


def test_the_three_formats_give_the_same_records(tmp_path: Path) -> None:
    records = [{"prompt": 'a, "b"; c\nd', "response": "é ü 我"}, {"prompt": "x", "response": ""}]
    (tmp_path / "r.json").write_text(json.dumps(records), encoding="utf-8-sig")
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "r.jsonl").write_text(lines, encoding="utf-8-sig")
    with (tmp_path / "r.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(records)
    for suffix in ("json", "jsonl", "csv"):
        assert [record for _, record in read_records(tmp_path / f"r.{suffix}")] == records


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
@example(rows=[("two\r\nlines", "and\rmore"), ("", '"')])
def test_csv_text_comes_back_as_it_was_written(
    rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("csv") / "r.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("prompt", "response"), *rows])
    assert [(r["prompt"], r["response"]) for _, r in read_records(path)] == rows


def test_rows_of_json_lines_are_numbered_by_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [place for place, _ in read_records(path)] == [f"{path}, row 1", f"{path}, row 3"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("r.json", b"[{]", "not JSON at line 1"),
        ("r.json", b"", "not JSON at line 1"),
        ("r.json", b'{"rows": []}', "expected a JSON list"),
        ("r.jsonl", b'{"a": 1}\n{oops\n', "row 2: not JSON"),
        ("r.csv", b'a,b\n"x,y\n', "not CSV"),
        ("r.jsonl", b"\xff\xfe", "not UTF-8"),
        ("r.txt", b"x", "unknown file type '.txt'"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, content: bytes, named: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_records(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))
    assert named in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: No such file"):
        read_records(tmp_path / "nowhere.json")
