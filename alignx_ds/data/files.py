"""Records of a local .json, .jsonl, .csv or .parquet file, each with its place (file and row) for error messages."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from alignx_ds.data.rows import Record
from alignx_ds.errors import DataError

PlacedRecord = tuple[str, Record]  # (file and row, record)
csv.field_size_limit(2**31 - 1)  # no shorter limit than for the other types of file


def read_records(path: Path) -> Iterator[PlacedRecord]:
    """Stream the file's records. Raises DataError naming file and row."""
    if path.suffix not in READERS:
        raise DataError(f"{path}: unknown file type '{path.suffix}'; give a {', '.join(READERS)} file")
    try:
        for number, record in READERS[path.suffix](path):
            yield f"{path}, row {number}", record
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the path in the recipe") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; re-encode the file as UTF-8") from error


def _open(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", newline="")


class DuplicateKeys:
    """A hook for the JSON reader that records each object with a repeated key. Python keeps the last value alone."""

    def __init__(self) -> None:
        self.found: list[tuple[dict[str, Any], str]] = []

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            self.found.append((parsed, next(key for key, count in counts.items() if count > 1)))
        return parsed

    def check(self, place: str, value: Any) -> None:
        """Raises DataError when the value is or contains one of these objects."""
        for key in (key for parsed, key in self.found if parsed is value):
            raise DataError(f"{place}: column '{key}' occurs twice; remove one of the two")
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            self.check(place, inner)


def _read_json(path: Path) -> Iterator[tuple[int, Record]]:
    with _open(path) as file:
        text = file.read()
    duplicates = DuplicateKeys()
    try:
        rows = json.loads(text, object_pairs_hook=duplicates)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: not JSON that can be read: {_json_limit(error)}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of rows, got {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        if duplicates.found:
            duplicates.check(f"{path}, row {number}", row)
        yield number, row


def _read_jsonl(path: Path) -> Iterator[tuple[int, Record]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse_line(line, f"{path}, row {number}")


def _parse_line(line: str, place: str) -> Record:
    duplicates = DuplicateKeys()
    try:
        record: Record = json.loads(line, object_pairs_hook=duplicates)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON at column {error.colno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{place}: not JSON that can be read: {_json_limit(error)}") from error
    if duplicates.found:
        duplicates.check(place, record)
    return record


def _json_limit(error: Exception) -> str:
    """Which of the two limits of Python's JSON reader the text exceeds."""
    return "its brackets are nested too deep" if isinstance(error, RecursionError) else "a number has too many digits"


def _read_csv(path: Path) -> Iterator[tuple[int, Record]]:
    number = 0
    with _open(path) as file:
        try:
            reader = csv.DictReader(file, strict=True)
            _check_distinct(path, [name for name in reader.fieldnames or () if name])  # spreadsheets add empty columns
            for number, record in enumerate(reader, start=1):
                if None in record:
                    problem = "more cells than columns; quote the cell that holds a comma"
                    raise DataError(f"{path}, row {number}: {problem}")
                yield number, dict(record)
        except csv.Error as error:
            raise DataError(f"{path}, row {number + 1}: not CSV: {error}") from error


def _check_distinct(path: Path, columns: Iterable[str]) -> None:
    """A record could hold only one of two columns with the same name."""
    for name, count in Counter(columns).items():
        if count > 1:
            raise DataError(f"{path}: {count} columns are called '{name}'; rename all but one")


def _read_parquet(path: Path) -> Iterator[tuple[int, Record]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _check_distinct(path, file.schema_arrow.names)
            for batch in file.iter_batches():
                yield from enumerate(_to_python(batch, path, number), start=number + 1)
                number += len(batch)
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise
        raise DataError(f"{path}: not Parquet after row {number}: {str(error).splitlines()[0]}") from error


def _to_python(batch: Any, path: Path, before: int) -> list[Record]:
    """The batch's records. Raises DataError naming row and column of a cell that has no Python value."""
    try:
        records: list[Record] = batch.to_pylist()
    except (ValueError, OverflowError):  # not UTF-8, a date after the year 9999, or two fields with the same name
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for number, cell in enumerate(column, start=before + 1):
                try:
                    cell.as_py()
                except (ValueError, OverflowError) as error:
                    problem = f"column '{name}' can't be read: {str(error).splitlines()[0]}"
                    raise DataError(f"{path}, row {number}: {problem}") from error
        raise
    return records


READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
