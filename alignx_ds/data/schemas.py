"""The published row schemas, read and checked: Alpaca, BeaverTails, TruthfulQA, and plain prompt/response lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from alignx_ds.data.rows import Record, Row
from alignx_ds.errors import DataError

NO_INPUT = frozenset({"noinput", "<noinput>", "no input"})  # what the original Alpaca writes for an empty input


@dataclass(frozen=True)
class Schema:
    """`parse` makes the training rows, `parse_held_out` the rows that are judged, from (place, record) pairs."""

    columns: dict[str, type]
    parse: Callable[[list[tuple[str, Record]]], list[Row]]
    parse_held_out: Callable[[list[tuple[str, Record]]], list[Row]]


def _text(place: str, record: Record, column: str) -> str:
    text = _optional_text(place, record, column)
    if not text:
        raise DataError(f"{place}: column '{column}' is empty; fill it in or remove the row")
    return text


def _optional_text(place: str, record: Record, column: str) -> str:
    text = str(record[column]).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: column '{column}' is no valid Unicode at character {error.start}") from error
    return text


def _alpaca(records: list[tuple[str, Record]]) -> list[Row]:
    rows = []
    for place, r in records:
        instruction, extra = _text(place, r, "instruction"), _optional_text(place, r, "input")
        prompt = instruction if extra.lower() in ("", *NO_INPUT) else f"{instruction}\n{extra}"
        rows.append(Row(prompt, _text(place, r, "output"), place=place))
    return rows


def _beavertails(records: list[tuple[str, Record]]) -> list[Row]:
    """Only safe answers are imitated."""
    harmful = _harmful_prompts(records)
    safe = [(place, _text(place, r, "prompt"), _text(place, r, "response")) for place, r in records if r["is_safe"]]
    return [Row(prompt, response, prompt in harmful, place=place) for place, prompt, response in safe]


def _beavertails_held_out(records: list[tuple[str, Record]]) -> list[Row]:
    """One row a prompt, with a safe answer as reference; a prompt that some answer met with harm is harmful."""
    harmful = _harmful_prompts(records)
    rows: dict[str, Row] = {}
    for place, r in records:
        prompt, response = _text(place, r, "prompt"), _text(place, r, "response")
        if r["is_safe"] or prompt not in rows:
            rows[prompt] = Row(prompt, response if r["is_safe"] else "", prompt in harmful, place=place)
    return list(rows.values())


def _harmful_prompts(records: list[tuple[str, Record]]) -> set[str]:
    return {r["prompt"].strip() for _, r in records if not r["is_safe"]}


def _truthfulqa(records: list[tuple[str, Record]]) -> list[Row]:
    rows = []
    for place, r in records:
        best = _text(place, r, "Best Answer")
        correct = (best, *_answers(_text(place, r, "Correct Answers")))
        incorrect = _answers(r["Incorrect Answers"])
        rows.append(Row(_text(place, r, "Question"), best, correct=correct, incorrect=incorrect, place=place))
    return rows


def _answers(joined: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in joined.split(";") if part.strip())


def _plain(records: list[tuple[str, Record]]) -> list[Row]:
    return [Row(_text(place, r, "prompt"), _text(place, r, "response"), place=place) for place, r in records]


SCHEMAS: dict[str, Schema] = {
    "alpaca": Schema({"instruction": str, "input": str, "output": str}, _alpaca, _alpaca),
    "beavertails": Schema(
        {"prompt": str, "response": str, "category": dict, "is_safe": bool}, _beavertails, _beavertails_held_out
    ),
    "truthfulqa": Schema(
        {"Question": str, "Best Answer": str, "Correct Answers": str, "Incorrect Answers": str},
        _truthfulqa,
        _truthfulqa,
    ),
    "plain": Schema({"prompt": str, "response": str}, _plain, _plain),
}


def read_records(path: Path) -> list[tuple[str, Record]]:
    """(place, record) of every row of a .json, .jsonl or .csv file; the place names file and row for error messages."""
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix not in readers:
        raise DataError(f"{path}: unknown file type '{path.suffix}'; give a {', '.join(readers)} file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            records = [(f"{path}, row {number}", record) for number, record in readers[path.suffix](path, file)]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the path in the recipe") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; re-encode the file as UTF-8") from error
    return records


def _read_json(path: Path, file: TextIO) -> Iterator[tuple[int, Record]]:
    try:
        rows = json.load(file)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of rows, got {type(rows).__name__}")
    yield from enumerate(rows, start=1)


def _read_jsonl(path: Path, file: TextIO) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, row {number}: not JSON at column {error.colno}: {error.msg}") from error


def _read_csv(path: Path, file: TextIO) -> Iterator[tuple[int, Record]]:
    try:
        yield from enumerate(csv.DictReader(file, strict=True), start=1)
    except csv.Error as error:
        raise DataError(f"{path}: not CSV: {error}") from error


def check_columns(records: list[tuple[str, Record]], schema: str) -> None:
    """Every record has every column of the schema, with the right type; otherwise DataError naming row and column."""
    for place, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected an object with columns, got {type(record).__name__}")
        if None in record:
            raise DataError(f"{place}: more cells than columns; quote the cell that holds a comma")
        for column, kind in SCHEMAS[schema].columns.items():
            if record.get(column) is None:
                present = ", ".join(str(key) for key in record)
                raise DataError(f"{place}: no column '{column}', which the {schema} schema needs; it has {present}")
            if not isinstance(record[column], kind):
                given = type(record[column]).__name__
                raise DataError(f"{place}: column '{column}' is {given}, the {schema} schema needs {kind.__name__}")
