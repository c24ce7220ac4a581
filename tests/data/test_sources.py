"""Where an axis's rows come from: files and the world give the same rows, and digests and splits can be trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignx_ds.data.rows import Row, split
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.sources import Dataset, load
from alignx_ds.data.world.files import FILES, write_files
from alignx_ds.errors import DataError


def write_plain(path: Path, prompts: list[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": p, "response": f"re {p}"}) + "\n" for p in prompts))
    return str(path)


def load_plain(source: str, limit: int = 100) -> Dataset:
    return load(source, "plain", held_out=False, limit=limit, seed=0)


def test_the_limit_takes_rows_from_the_start(tmp_path: Path) -> None:
    source = write_plain(tmp_path / "r.jsonl", ["a", "b", "c"])
    assert [row.prompt for row in load_plain(source, limit=2).rows] == ["a", "b"]
    assert len(load_plain(source, limit=9).rows) == 3


def test_the_digest_tells_contents_apart(tmp_path: Path) -> None:
    first = write_plain(tmp_path / "first.jsonl", ["a", "b"])
    same = write_plain(tmp_path / "same.jsonl", ["a", "b"])
    other = write_plain(tmp_path / "other.jsonl", ["a", "c"])
    assert load_plain(first).digest == load_plain(same).digest
    assert len({load_plain(first).digest, load_plain(other).digest, load_plain(first, limit=1).digest}) == 3


@pytest.mark.parametrize(("name", "content"), [("r.json", "[]"), ("r.jsonl", "\n"), ("r.csv", "prompt,response\n")])
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name}: no usable row"):
        load_plain(str(tmp_path / name))


def test_rows_that_no_training_can_use_are_refused(tmp_path: Path) -> None:
    record = {"prompt": "a", "response": "b", "category": {}, "is_safe": False}
    (tmp_path / "r.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError, match="no usable row"):
        load(str(tmp_path / "r.jsonl"), "beavertails", held_out=False, limit=9, seed=0)


def test_a_csv_row_with_too_many_cells_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("prompt,response\na,b\nc,d,e\n")
    with pytest.raises(DataError, match=r"r\.csv, row 2"):
        load_plain(str(tmp_path / "r.csv"))


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_written_world_reads_back_as_the_world(tmp_path: Path, schema: str) -> None:
    """The rows go through real JSON, JSON lines and CSV files, and come back equal."""
    write_files(tmp_path, rows=40, seed=3)
    for part in ("train", "held_out"):
        path = tmp_path / f"{schema}_{part}.{FILES[schema]}"
        from_file = load(str(path), schema, held_out=part == "held_out", limit=40, seed=0)
        from_world = load("world", schema, held_out=part == "held_out", limit=40, seed=3)
        assert from_file.rows == from_world.rows


def test_written_files_are_never_overwritten(tmp_path: Path) -> None:
    write_files(tmp_path, rows=3, seed=0)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match="exists already"):
        write_files(tmp_path, rows=4, seed=1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_world_depends_on_the_seed_alone() -> None:
    first, again, other = (load("world", "alpaca", held_out=False, limit=50, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.digest != other.digest
    assert first.rows != other.rows


@given(
    prompts=st.lists(st.sampled_from([f"question {n}" for n in range(30)]), max_size=60),
    share=st.floats(0.0, 1.0),
)
def test_no_question_is_on_both_sides_of_a_split(prompts: list[str], share: float) -> None:
    rows = [Row(prompt, f"answer {n}") for n, prompt in enumerate(prompts)]
    kept, back = split(rows, share)
    assert not {r.prompt for r in kept} & {r.prompt for r in back}
    assert sorted((*kept, *back), key=rows.index) == rows


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 1.0])
def test_a_split_holds_back_the_share_it_was_asked_for(share: float) -> None:
    rows = [Row(f"question {n}", "answer") for n in range(4000)]
    _, back = split(rows, share)
    assert len(back) / len(rows) == pytest.approx(share, abs=0.03)
