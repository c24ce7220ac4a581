"""Where rows come from: files and the world give the same rows, and digests and splits can be trusted."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import parsed, read, world_rows, write_lines

from alignx_ds.data.rows import Row, digest, split_by_question
from alignx_ds.data.schemas import SCHEMAS, schema_problem
from alignx_ds.data.world.files import FILES, write_files
from alignx_ds.errors import DataError

QUESTIONS = st.lists(st.sampled_from([f"question {n}" for n in range(30)]), max_size=60)


def write_plain(path: Path, prompts: list[str]) -> Path:
    return write_lines(path, ({"prompt": p, "response": f"re {p}"} for p in prompts))


def test_the_limit_takes_rows_from_the_start(tmp_path: Path) -> None:
    source = write_plain(tmp_path / "r.jsonl", ["a", "b", "c"])
    assert [record["prompt"] for _, record in read(source, "plain", limit=2)] == ["a", "b"]
    assert len(read(source, "plain", limit=9)) == len(read(source, "plain")) == 3


def test_the_digest_tells_contents_apart_and_nothing_else(tmp_path: Path) -> None:
    first, same, other = (
        parsed(write_plain(tmp_path / f"{name}.jsonl", [*prompts]), "plain").rows
        for name, prompts in (("first", "ab"), ("same", "ab"), ("other", "ac"))
    )
    assert digest(first) == digest(same), "where a row stands is not what it says"
    assert len({digest(first), digest(other), digest(first[:1]), digest(first[::-1])}) == 4
    assert digest([Row("a", "b", harmful=True)]) != digest([Row("a", "b")])
    assert digest([Row("a", "b", incorrect=("c",))]) != digest([Row("a", "b")])


def test_nothing_after_the_limit_is_read(tmp_path: Path) -> None:
    source = write_plain(tmp_path / "r.jsonl", ["a", "b"])
    source.write_text(source.read_text() + "{oops\n")
    assert len(read(source, "plain", limit=2)) == 2
    with pytest.raises(DataError, match="row 3: not JSON"):
        read(source, "plain")


@pytest.mark.parametrize("schema", FILES)
def test_the_written_world_reads_back_as_the_world(tmp_path: Path, schema: str) -> None:
    """The rows go through real JSON, JSON lines and CSV files, and come back equal."""
    write_files(tmp_path, rows=40, seed=3)
    for part in ("train", "held_out"):
        held_out = part == "held_out"
        rows = parsed(tmp_path / f"{schema}_{part}.{FILES[schema]}", schema, held_out=held_out).rows
        assert rows
        assert rows[:40] == world_rows(schema, held_out=held_out, limit=40, seed=3)


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


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_mapping_of_columns_that_the_schema_has_not_is_named(schema: str) -> None:
    assert schema_problem(schema, dict.fromkeys(SCHEMAS[schema].columns, "anything")) == ""
    problem = schema_problem(schema, {"completion": "text"})
    assert "completion" in problem
    assert all(name in problem for name in SCHEMAS[schema].columns)


@given(prompts=QUESTIONS, share=st.floats(0.0, 1.0))
def test_no_question_is_on_both_sides_of_a_split(prompts: list[str], share: float) -> None:
    rows = [Row(prompt, f"answer {n}") for n, prompt in enumerate(prompts)]
    kept, back = split_by_question(rows, share, "salt")
    assert not {r.question for r in kept} & {r.question for r in back}
    assert sorted((*kept, *back), key=rows.index) == rows


@given(words=st.lists(st.text("aBcİßﬁÉ?", min_size=1), min_size=1), share=st.floats(0.0, 1.0), spaces=st.data())
def test_case_and_spacing_do_not_make_another_question(words: list[str], share: float, spaces: st.DataObject) -> None:
    gap = st.text(" \t\n\u00a0\u3000", min_size=1, max_size=3)
    spaced = "".join(word + spaces.draw(gap) for word in words)
    one, other = Row(" ".join(words), "a"), Row(spaces.draw(gap) + spaced.swapcase().casefold().upper(), "b")
    if "".join(words).casefold() == "".join(words).swapcase().casefold().upper().casefold():
        assert one.question == other.question
        assert one.position("salt") == other.position("salt")
        assert 0 in map(len, split_by_question([one, other], share, "salt"))


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 1.0])
def test_a_split_holds_back_the_share_it_was_asked_for(share: float) -> None:
    rows = [Row(f"question {n}", "answer") for n in range(4000)]
    _, back = split_by_question(rows, share, "salt")
    assert len(back) / len(rows) == pytest.approx(share, abs=0.03)


def test_splits_of_different_salts_are_independent() -> None:
    rows = [Row(f"question {n}", "answer") for n in range(4000)]
    kept, back = split_by_question(rows, 0.5, "one")
    for part in (kept, back):
        _, again = split_by_question(part, 0.5, "another")
        assert len(again) / len(part) == pytest.approx(0.5, abs=0.04)
