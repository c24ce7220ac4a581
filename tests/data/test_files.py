"""Local files of every type give the same records, and an error names file, row and column."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as arrow
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from reading import read

from alignx_ds.data.files import READERS, read_records
from alignx_ds.data.rows import Record
from alignx_ds.data.sources import is_file, names_a_source
from alignx_ds.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def write(path: Path, records: list[Record]) -> Path:
    """In the file type of the suffix."""
    if path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8-sig")
    elif path.suffix == ".jsonl":
        lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        path.write_text(lines, encoding="utf-8-sig")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        parquet.write_table(arrow.Table.from_pylist(records), path, row_group_size=2)
    return path


@pytest.mark.parametrize("suffix", READERS)
def test_every_type_gives_the_same_records(tmp_path: Path, suffix: str) -> None:
    records = [{"prompt": 'a, "b"; c\nd', "response": "é ü 我 🙂"}, {"prompt": "x", "response": ""}]
    assert [record for _, record in read_records(write(tmp_path / f"r{suffix}", records))] == records


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), suffix=st.sampled_from([".csv", ".parquet"]))
@example(rows=[("two\r\nlines", "and\rmore"), ("", '"')], suffix=".csv")
def test_text_is_read_as_it_was_written(
    rows: list[tuple[str, str]], suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("file") / f"r{suffix}"
    write(path, [{"prompt": prompt, "response": response} for prompt, response in rows])
    assert [(r["prompt"], r["response"]) for _, r in read_records(path)] == rows


def test_rows_of_json_lines_are_numbered_by_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [place for place, _ in read_records(path)] == [f"{path}, row 1", f"{path}, row 3"]


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_rows_of_other_files_are_numbered_from_one(tmp_path: Path, suffix: str) -> None:
    """Across the row groups of Parquet too."""
    path = write(tmp_path / f"r{suffix}", [{"prompt": str(n)} for n in range(1, 8)])
    assert [place for place, _ in read_records(path)] == [f"{path}, row {n}" for n in range(1, 8)]
    assert [record["prompt"] for _, record in read_records(path)] == [str(n) for n in range(1, 8)]


def test_rows_of_a_long_parquet_file_are_numbered_across_its_parts(tmp_path: Path) -> None:
    parquet.write_table(arrow.table({"number": range(1, 70_001)}), tmp_path / "r.parquet")
    places = [(place, record["number"]) for place, record in read_records(tmp_path / "r.parquet")]
    assert places == [(f"{tmp_path / 'r.parquet'}, row {n}", n) for n in range(1, 70_001)]


@pytest.mark.parametrize(("suffix", "value"), [(".json", 3), (".jsonl", 3.5), (".jsonl", ["a"]), (".parquet", 3)])
def test_a_malformed_row_is_named_with_file_row_and_column(tmp_path: Path, suffix: str, value: object) -> None:
    """A column of Parquet has one type, so every row has the wrong one."""
    first = "a" if suffix != ".parquet" else value
    records = [{"prompt": "a", "response": first}, {"prompt": "a", "response": value}]
    path = write(tmp_path / f"r{suffix}", records)
    number = 2 if first == "a" else 1
    with pytest.raises(DataError) as error:
        read(path, "plain")
    assert str(error.value).startswith(f"{path}, row {number}: column 'response' ")
    assert len(str(error.value).splitlines()) == 1


def test_a_short_row_of_csv_is_named_with_its_column(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("prompt,response\na,b\nc\n")
    with pytest.raises(DataError, match=r"r\.csv, row 2: column 'response' has no value"):
        read(tmp_path / "r.csv", "plain")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("r.json", b"[{]", ": not JSON at line 1, column 3"),
        ("r.json", b"", ": not JSON at line 1"),
        ("r.json", b'{"rows": []}', ": expected a JSON list"),
        ("r.json", b"[" * 100_000, "nested too deep"),
        ("r.jsonl", b'{"a": 1}\n{oops\n', ", row 2: not JSON at column 2"),
        ("r.csv", b'a,b\nx,y\n"x,y\n', ", row 2: not CSV"),
        ("r.csv", b'a,b\n"x"y,z\n', ", row 1: not CSV"),
        ("r.csv", b"a,b\nx,y\nx,y,z\n", ", row 2: more cells than columns"),
        ("r.parquet", b"", ": not Parquet"),
        ("r.parquet", b"PAR1garbagePAR1", ": not Parquet"),
        ("r.jsonl", b"\xff\xfe", ": not UTF-8 at byte 0"),
        ("r.csv", b"a,b\nx,\xff\n", ": not UTF-8 at byte 6"),
        ("r.txt", b"x", "unknown file type '.txt'"),
    ],
)
def test_an_unreadable_file_is_named_with_the_reason(tmp_path: Path, name: str, content: bytes, named: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_records(tmp_path / name))
    assert str(error.value).startswith(str(tmp_path / name))
    assert named in str(error.value)
    assert len(str(error.value).splitlines()) == 1


ROWS: list[Record] = [{"prompt": "a", "response": "é"}, {"prompt": "b\nc", "response": ""}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.json", LINES.encode()),
        ("r.jsonl", json.dumps(ROWS).encode()),
        ("r.jsonl", b"\n" + json.dumps(ROWS, indent=2).encode("utf-8-sig")),
        ("r.ndjson", LINES.encode()),
        ("r.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("r.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("r.json.xz", lzma.compress(LINES.encode())),
        ("r.csv.bz2", bz2.compress(b'prompt,response\na,\xc3\xa9\n"b\nc",\n')),
    ],
)
def test_content_decides_between_a_list_and_lines_and_files_may_be_compressed(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content.replace(b"\n\xef\xbb\xbf", b"\xef\xbb\xbf\n"))
    assert [record for _, record in read_records(tmp_path / name)] == ROWS
    assert is_file(str(tmp_path / name)) and names_a_source(str(tmp_path / name))


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(LINES.encode() * 9, mtime=0)[:-20], b""])
def test_a_damaged_compressed_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.jsonl.gz").write_bytes(content)
    if content:
        with pytest.raises(DataError, match=r"r\.jsonl\.gz: can't be decompressed \([^\n]+$"):
            list(read_records(tmp_path / "r.jsonl.gz"))
    else:
        assert list(read_records(tmp_path / "r.jsonl.gz")) == []


def test_a_damaged_parquet_file_is_an_error_of_data(tmp_path: Path) -> None:
    path = write(tmp_path / "r.parquet", [{"prompt": f"{n} " * 50, "response": str(n)} for n in range(500)])
    damaged = bytearray(path.read_bytes())
    damaged[200:2000] = b"\xff" * 1800
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"r\.parquet: not Parquet after row \d+: [^\n]+$"):
        list(read_records(path))


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match=rf"nowhere\{suffix}: .*No such file"):
        list(read_records(tmp_path / f"nowhere{suffix}"))
