"""Data sets read through `datasets`: a directory of files, its splits, and an unreachable hub."""

from __future__ import annotations

from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow import parquet
from reading import GOOD, read, write_lines

from alignx_ds.data.rows import Record, Row
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.sources import names_a_source
from alignx_ds.errors import DataError, UserError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A data set of two splits, as `datasets` reads it from a directory."""
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        write_lines(tmp_path / "set" / f"{split}.jsonl", [{"prompt": f"{split} {n}", "response": "a"} for n in "123"])
    return tmp_path / "set"


def prompts(source: str | Path, limit: int = 0) -> list[str]:
    return [record["prompt"] for _, record in read(source, "plain", limit=limit)]


def test_a_directory_is_a_data_set(directory: Path) -> None:
    assert names_a_source(str(directory))
    assert prompts(directory) == ["train 1", "train 2", "train 3"]
    assert prompts(f"{directory}:test") == prompts(f"{directory}:default:test") == ["test 1", "test 2", "test 3"]


def test_rows_have_their_place(directory: Path) -> None:
    assert [place for place, _ in read(f"{directory}:test", "plain")] == [f"{directory}:test, row {n}" for n in "123"]


def test_nothing_after_the_limit_is_read(directory: Path) -> None:
    """Rows after the limit may be malformed."""
    with (directory / "train.jsonl").open("a") as file:
        file.write('{"prompt": "train 4", "response": 3}\n')
    assert prompts(directory, limit=2) == ["train 1", "train 2"]
    with pytest.raises(DataError, match=r"row 4: column 'response' is int"):
        read(directory, "plain")


@pytest.mark.parametrize("name", ["truthfulqa", "truthfulqa_mc", "preference", "beavertails"])
def test_lists_and_structs_come_through_parquet(tmp_path: Path, name: str) -> None:
    """In the hub's form: multiple choice has lists of choices and labels there."""
    record: Record = dict(GOOD[name])
    if name == "truthfulqa":
        record |= {"Correct Answers": ["So.", "Thus."], "Incorrect Answers": ["No."]}
    if name == "truthfulqa_mc":
        for column in ("mc1_targets", "mc2_targets"):
            record[column] = {"choices": list(record[column]), "labels": list(record[column].values())}
    (tmp_path / "set").mkdir()
    parquet.write_table(arrow.Table.from_pylist([record]), tmp_path / "set/train.parquet")
    expected = SCHEMAS[name].parse([("", GOOD[name])]).rows
    for source in (tmp_path / "set", tmp_path / "set/train.parquet"):
        rows = SCHEMAS[name].parse(read(source, name)).rows
        assert [row.response for row in rows] == [row.response for row in expected]
        assert [set(row.correct) for row in rows] == [set(row.correct) for row in expected]
        assert rows == expected


def one_line(source: str | Path) -> str:
    with pytest.raises(UserError) as error:
        read(source, "plain")
    (line,) = str(error.value).splitlines()
    assert line.startswith(str(source))
    return line


def test_a_split_or_config_that_does_not_exist_is_named_with_those_that_do(directory: Path) -> None:
    line = one_line(f"{directory}:validation")
    assert "validation" in line
    assert "train" in line.removeprefix(str(directory)) and "test" in line.removeprefix(str(directory))
    assert "multiple" in one_line(f"{directory}:multiple:train")


@pytest.mark.parametrize("source", ["nobody/nothing", "nobody/nothing:config:test"])
def test_an_unreachable_hub_is_reported_in_one_line(source: str) -> None:
    assert names_a_source(source)
    assert "can't be reached" in one_line(source)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", b'{"prompt": "a", "response": "b"}\n{oops\n'),
        ("train.jsonl", b""),
        ("train.csv", b'prompt,response\n"c,d\n'),
        ("train.parquet", b"PAR1"),
        ("notes.md", b"no rows"),
        ("", b""),  # an empty directory
    ],
)
def test_a_data_set_that_cannot_be_read_is_named_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    if name:
        (tmp_path / name).write_bytes(content)
    one_line(tmp_path)


@pytest.mark.parametrize("source", ["no/such/directory", "a b/c", "lonely", "nowhere.json", "a/b:c:d:e"])
def test_an_impossible_source_is_refused_before_it_is_read(source: str) -> None:
    assert not names_a_source(source)


def test_a_data_set_gives_the_rows_that_its_file_gives(directory: Path) -> None:
    from_file, from_set = (
        SCHEMAS["plain"].parse(read(s, "plain")).rows for s in (directory / "train.jsonl", directory)
    )
    assert from_file == from_set == [Row(f"train {n}", "a") for n in "123"]
