"""Data sets read through `datasets`: a directory of files, its splits, and an unreachable hub."""

from __future__ import annotations

import gzip
from pathlib import Path

import datasets
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
    file = directory / "test.jsonl"
    assert [place for place, _ in read(f"{directory}:test", "plain")] == [f"{file}, row {n}" for n in "123"]


def test_a_directory_of_several_files_is_read_in_their_order(tmp_path: Path) -> None:
    for name in "ba":
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(gzip.compress(b'{"prompt": "%s", "response": "x"}\n' % name.encode()))
    assert prompts(tmp_path) == ["a", "b"]


def test_a_file_of_a_directory_that_would_be_left_out_is_named(directory: Path) -> None:
    write_lines(directory / "more.jsonl", [{"prompt": "more", "response": "a"}])
    assert "more.jsonl would not be read" in one_line(directory)


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    columns = {split: {"prompt": [f"{split} {n}" for n in "12"], "response": ["a", "b"]} for split in ("train", "test")}
    parts = {split: datasets.Dataset.from_dict(part) for split, part in columns.items()}
    parts["test"].save_to_disk(tmp_path / "one")
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "several")
    assert prompts(tmp_path / "one") == prompts(f"{tmp_path / 'several'}:test") == ["test 1", "test 2"]
    assert prompts(tmp_path / "several") == ["train 1", "train 2"]
    assert "has no splits" in one_line(f"{tmp_path / 'one'}:test")
    assert "has no split 'dev', it has train, test" in one_line(f"{tmp_path / 'several'}:dev")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"damaged")
    one_line(tmp_path / "one")


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
