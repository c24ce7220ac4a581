"""Records of a local JSON, JSON Lines, CSV or Parquet file, each with its place (file and row) for error messages.

JSON and JSON Lines are told apart by their content: both are often saved under either suffix. All but Parquet may be
compressed.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from alignx_ds.data.rows import Record
from alignx_ds.errors import DataError

PlacedRecord = tuple[str, Record]  # (file and row, record)
csv.field_size_limit(2**31 - 1)  # no shorter limit than for the other types of file


def file_type(path: str | Path) -> str:
    """The suffix that names the file's type, without that of its compression: ".jsonl" of rows.jsonl.gz."""
    inner, suffix = Path(path), Path(path).suffix
    if suffix in OPENERS:
        inner, suffix = Path(inner.stem), Path(inner.stem).suffix
    return SAME_TYPE.get(suffix, suffix)


def read_records(path: Path) -> Iterator[PlacedRecord]:
    """Stream the file's records. Raises DataError naming file and row."""
    kind = file_type(path)
    if kind not in READERS:
        problem = f"unknown file type '{path.suffix}'; give a {', '.join(READERS)} file, the first three also as .gz"
        raise DataError(f"{path}: {problem}")
    try:
        for number, record in READERS[kind](path):
            yield f"{path}, row {number}", record
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}: can't be decompressed ({error}); write or download it again") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check the path in the recipe") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; re-encode the file as UTF-8") from error


def _open(path: Path) -> TextIO:
    opened: TextIO = OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", newline="")
    return opened


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
    """A .json or .jsonl file: a JSON list, or one object per line."""
    with _open(path) as file:
        lines: Iterator[tuple[int, str]] = enumerate(file, start=1)
        first = next(((n, line) for n, line in lines if line.strip()), (1, ""))
        if file_type(path) == ".json" or first[1].lstrip().startswith("["):
            rest = list(lines)
            if not any(line.strip() for _, line in rest) or not _is_object(first[1]):
                yield from _read_list(path, "\n" * (first[0] - 1) + first[1] + "".join(line for _, line in rest))
                return
            lines = iter(rest)
        for number, line in chain([first], lines):
            if line.strip():
                yield number, _parse_line(line, f"{path}, row {number}")


def _is_object(line: str) -> bool:
    """Whether a line is a whole JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_list(path: Path, text: str) -> Iterator[tuple[int, Record]]:
    duplicates = DuplicateKeys()
    try:
        rows = json.loads(text, object_pairs_hook=duplicates)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: not JSON that can be read: {_json_limit(error)}") from error
    if not isinstance(rows, list):
        found = "one object" if isinstance(rows, dict) else type(rows).__name__
        raise DataError(f"{path}: expected a JSON list of rows, or an object on each line, got {found}")
    for number, row in enumerate(rows, start=1):
        if duplicates.found:
            duplicates.check(f"{path}, row {number}", row)
        yield number, row


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
                if None in record.values():
                    short = next(name for name, cell in record.items() if cell is None)
                    raise DataError(f"{path}, row {number}: column '{short}' has no value; the row has too few cells")
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


OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SAME_TYPE = {".ndjson": ".jsonl"}
READERS = {".json": _read_json, ".jsonl": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
