"""Where records come from: files and the world give the same rows, and no more is read than the limit says."""

from __future__ import annotations

from pathlib import Path

import pytest
from reading import parsed, questions, read, set_rows, world_rows, write_json, write_lines

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.rows import Record, digest
from alignx_ds.data.splits import read_splits
from alignx_ds.data.world.composites import SETS
from alignx_ds.data.world.files import FILES, write_files
from alignx_ds.errors import DataError


def write_plain(path: Path, prompts: list[str]) -> Path:
    return write_lines(path, ({"prompt": p, "response": f"re {p}"} for p in prompts))


def test_the_limit_takes_rows_from_the_start(tmp_path: Path) -> None:
    source = write_plain(tmp_path / "r.jsonl", ["a", "b", "c"])
    assert [record["prompt"] for _, record in read(source, "plain", limit=2)] == ["a", "b"]
    assert len(read(source, "plain", limit=9)) == len(read(source, "plain")) == 3


def test_nothing_after_the_limit_is_read(tmp_path: Path) -> None:
    source = write_plain(tmp_path / "r.jsonl", ["a", "b"])
    source.write_text(source.read_text() + "{oops\n")
    assert len(read(source, "plain", limit=2)) == 2
    with pytest.raises(DataError, match="row 3: not JSON"):
        read(source, "plain")


@pytest.mark.parametrize("name", FILES)
def test_the_written_world_reads_back_as_the_world(tmp_path: Path, name: str) -> None:
    """The rows go through real JSON, JSON lines and CSV files, and come back equal."""
    write_files(tmp_path, rows=40, seed=3)
    schema, source = ("labelled", f"world:{name}") if name in SETS else (name, "world")
    for part in ("train", "held_out"):
        held_out = part == "held_out"
        rows = parsed(tmp_path / f"{name}_{part}.{FILES[name]}", schema, held_out=held_out).rows
        assert rows
        assert rows[:40] == world_rows(schema, held_out=held_out, limit=40, seed=3, source=source)


def test_written_files_are_never_overwritten(tmp_path: Path) -> None:
    write_files(tmp_path, rows=3, seed=0)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match="exists already"):
        write_files(tmp_path, rows=4, seed=1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_world_depends_on_the_seed_alone() -> None:
    first, again, other = (world_rows("alpaca", held_out=False, limit=50, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert digest(first) == digest(again) != digest(other)
    assert first != other


def test_the_input_of_alpaca_may_be_absent_or_null(tmp_path: Path) -> None:
    records: list[Record] = [
        {"instruction": "Add.", "output": "3"},
        {"instruction": "Add.", "input": None, "output": "3"},
    ]
    for written in ([records[0]], [records[1]], records):
        assert [row.prompt for row in parsed(write_json(tmp_path / "r.json", written), "alpaca").rows] == [
            "Add."
        ] * len(written)


def test_one_answer_without_a_value_drops_its_row_alone(tmp_path: Path, one_axis: RunConfig) -> None:
    """It is counted; a column that no row has a value in leaves no usable row, and one that no row has is an error."""
    records = questions(40)
    records[20]["response"] = None
    set_rows(one_axis, tmp_path, records)
    splits = read_splits(one_axis)
    train, held_out = splits.train["kind"], splits.held_out["kind"]
    assert len(train.rows) + len(held_out.rows) == 39
    assert train.records + held_out.records == 40
    assert [(d.place, d.reason) for d in train.dropped] == [
        (f"{tmp_path / 'train.jsonl'}, row 21", "no value in column 'response'")
    ]
    for record in records:
        record["response"] = None
    set_rows(one_axis, tmp_path, records)
    with pytest.raises(DataError, match=r"no usable row to train on of 40 records \(40 × no value in column 'respon"):
        read_splits(one_axis)
    set_rows(one_axis, tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(DataError, match=r"row 1: no column 'response', which the plain schema needs; it has prompt"):
        read_splits(one_axis)
