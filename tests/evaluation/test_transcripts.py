"""Answers and verdicts are stored one by one; resuming adds only what is missing, and ends in the same file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignx_ds.data.rows import Row
from alignx_ds.errors import DataError
from alignx_ds.evaluation import transcripts
from alignx_ds.evaluation.judges.protocol import Metrics, Verdict
from alignx_ds.evaluation.transcripts import AnswerFile

NASTY = 'two\u2028lines\x85 and\r\n\n "more" \\ \x00\x1f 😀 é'
ROWS = [
    Row("what is a dog ?", "an animal", correct=("an animal", "a pet"), incorrect=("a plant",), place="file, row 1"),
    Row(NASTY, "", harmful=True, category="unsafe"),
    Row("c", "chosen", rejected="rejected"),
    Row("d", "\n"),
    Row("e", "f"),
]
SAID = ["a pet", NASTY, "", "\n", "f"]
PROVENANCE = {"seed": 0, "model": "hash", "max_new_tokens": 4}


@dataclass
class Counting:
    """A judge of the length of answers, which records the prompts that it was given."""

    identity: dict[str, Any] = field(default_factory=lambda: {"judge": "length"})
    asked: list[str] = field(default_factory=list)
    stops_at: str | None = None

    def verdicts(self, rows: Sequence[Row], answers: Sequence[str]) -> Iterator[Verdict]:
        for row, answer in zip(rows, answers, strict=True):
            if row.prompt == self.stops_at:
                raise KeyboardInterrupt
            self.asked.append(row.prompt)
            yield {"length": len(answer), "text": answer}

    def metrics(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> Metrics:
        return {"score": sum(v["length"] for v in verdicts) / len(rows)}


def write_all(path: Path, rows: list[Row] = ROWS, said: list[str] = SAID, **changed: Any) -> AnswerFile:
    """Append what is missing, as `answer` does."""
    answers = AnswerFile(path, rows, PROVENANCE | changed)
    start = len(answers.load())
    answers.append(start, said[start:])
    return answers


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    write_all(tmp_path / "whole.jsonl")
    return (tmp_path / "whole.jsonl").read_bytes()


def places_to_stop(whole: bytes) -> list[int]:
    """Around the ends of all lines, and here and there within them."""
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    near = {end + shift for end in (0, *ends) for shift in (-2, -1, 0, 1)}
    return sorted(n for n in near | set(range(0, len(whole), 29)) if 0 <= n <= len(whole))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    answers = write_all(tmp_path / "a.jsonl")
    assert answers.load() == SAID and answers.is_complete()
    rows, outputs = transcripts.read(tmp_path / "a.jsonl")
    assert (rows, outputs) == (ROWS, SAID)
    assert [row.place for row in rows] == [f"{tmp_path / 'a.jsonl'}, row {n}" for n in range(1, 6)]


@settings(max_examples=40, deadline=None)
@given(said=st.lists(st.text(), min_size=1, max_size=5), asked=st.text())
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, said: list[str], asked: str) -> None:
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    rows = [Row(f"{asked}{n}", asked) for n in range(len(said))]
    write_all(path, rows, said)
    assert transcripts.read(path) == (rows, said)
    assert path.read_bytes().count(b"\n") == len(said), "one line per answer"


def test_every_line_holds_its_provenance(whole: bytes) -> None:
    for line, row in zip(whole.splitlines(), ROWS, strict=True):
        found = json.loads(line)
        assert {k: found[k] for k in PROVENANCE} == PROVENANCE
        assert set(found) == {"prompt", "output", "row", *PROVENANCE}
        assert found["row"]["category"] == row.category


def test_writing_resumes_after_an_interruption_anywhere(tmp_path: Path, whole: bytes) -> None:
    """Complete lines are kept, an incomplete one is written again, and the file ends up the same."""
    path = tmp_path / "a.jsonl"
    for end in places_to_stop(whole):
        path.write_bytes(whole[:end])
        kept = AnswerFile(path, ROWS, PROVENANCE).load()
        complete = whole[:end].count(b"\n")
        torn_before_its_newline = whole[end : end + 1] == b"\n"
        assert len(kept) in ((complete, complete + 1) if torn_before_its_newline else (complete,))
        assert kept == SAID[: len(kept)]
        write_all(path)
        assert path.read_bytes() == whole, end


@pytest.mark.parametrize("change", [{"model": "other"}, {"seed": 1}, {"max_new_tokens": 5}])
def test_another_provenance_invalidates_everything(tmp_path: Path, change: dict[str, Any]) -> None:
    write_all(tmp_path / "a.jsonl")
    assert AnswerFile(tmp_path / "a.jsonl", ROWS, PROVENANCE | change).load() == []
    assert (tmp_path / "a.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("number", "change"),
    [(0, {"prompt": "other"}), (2, {"response": "other"}), (2, {"harmful": True}), (4, {"correct": ("x",)})],
)
def test_another_row_invalidates_from_there_on(tmp_path: Path, number: int, change: dict[str, Any]) -> None:
    write_all(tmp_path / "a.jsonl")
    rows = list(ROWS)
    rows[number] = replace(rows[number], **change)
    assert AnswerFile(tmp_path / "a.jsonl", rows, PROVENANCE).load() == SAID[:number]
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == number


def test_where_a_row_lies_does_not_matter(tmp_path: Path) -> None:
    write_all(tmp_path / "a.jsonl")
    moved = [replace(row, place="elsewhere") for row in ROWS]
    assert AnswerFile(tmp_path / "a.jsonl", moved, PROVENANCE).is_complete()


def test_a_line_in_the_middle_that_was_changed_ends_what_is_kept(tmp_path: Path, whole: bytes) -> None:
    for foreign in (b"{}", b"3", b"[]", b"null", b"not json", b'{"output": 3}', b""):
        lines = whole.splitlines(keepends=True)
        lines[2] = foreign + b"\n"
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"".join(lines))
        assert AnswerFile(path, ROWS, PROVENANCE).load() == SAID[:2], foreign
        write_all(path)
        assert path.read_bytes() == whole


def test_more_answers_than_rows_are_cut(tmp_path: Path, whole: bytes) -> None:
    write_all(tmp_path / "a.jsonl")
    assert AnswerFile(tmp_path / "a.jsonl", ROWS[:2], PROVENANCE).is_complete()
    assert (tmp_path / "a.jsonl").read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])


@pytest.mark.parametrize(
    "foreign",
    ["{}", "[]", '{"prompt": "a", "output": "b", "row": {"response": "", "colour": "red"}}',
     '{"prompt": "a", "output": "b", "row": 3}', "{"],
)  # fmt: skip
def test_a_foreign_line_is_refused_with_file_and_row(tmp_path: Path, foreign: str) -> None:
    path = tmp_path / "a.jsonl"
    write_all(path, ROWS[:2], SAID[:2])
    with path.open("a") as file:
        file.write(foreign + "\n")
    with pytest.raises(DataError) as error:
        transcripts.read(path)
    assert str(error.value).startswith(f"{path}, row 3:")


def test_a_file_without_answers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match="no answers"):
        transcripts.read(tmp_path / "a.jsonl")


def judged(path: Path, judge: Counting, rows: list[Row] = ROWS, said: list[str] = SAID) -> list[Verdict]:
    return transcripts.verdicts(path, judge, rows, said)


def test_a_verdict_is_computed_once(tmp_path: Path) -> None:
    path, judge = tmp_path / "verdicts" / "v.jsonl", Counting()
    found = judged(path, judge)
    assert [v["text"] for v in found] == SAID
    assert judge.asked == [row.prompt for row in ROWS]
    assert judged(path, judge) == found
    assert len(judge.asked) == len(ROWS), "nothing is computed twice"


@pytest.mark.parametrize("number", [0, 2, 4])
def test_judging_resumes_after_an_interruption(tmp_path: Path, number: int) -> None:
    judged(tmp_path / "whole.jsonl", Counting())
    path, stopped, again = tmp_path / "v.jsonl", Counting(stops_at=ROWS[number].prompt), Counting()
    with pytest.raises(KeyboardInterrupt):
        judged(path, stopped)
    judged(path, again)
    assert stopped.asked == [row.prompt for row in ROWS[:number]]
    assert again.asked == [row.prompt for row in ROWS[number:]]
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_incomplete_verdict_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    expected = judged(path, Counting())
    whole = path.read_bytes()
    for end in places_to_stop(whole):
        path.write_bytes(whole[:end])
        judge = Counting()
        assert judged(path, judge) == expected
        assert len(judge.asked) <= len(ROWS) - whole[:end].count(b"\n")
        assert path.read_bytes() == whole, end


def test_another_judge_starts_anew(tmp_path: Path) -> None:
    path, other = tmp_path / "v.jsonl", Counting({"judge": "length", "threshold": 0.5})
    judged(path, Counting())
    judged(path, other)
    assert len(other.asked) == len(ROWS)
    assert path.read_bytes().count(b"\n") == len(ROWS)


@pytest.mark.parametrize("number", [0, 2, 4])
def test_another_answer_is_judged_anew_and_so_are_those_after_it(tmp_path: Path, number: int) -> None:
    path, again = tmp_path / "v.jsonl", Counting()
    judged(path, Counting())
    said = [*SAID]
    said[number] = "other"
    assert judged(path, again, said=said)[number]["text"] == "other"
    assert again.asked == [row.prompt for row in ROWS[number:]]


@pytest.mark.parametrize("change", [{"prompt": "other"}, {"response": "other"}, {"correct": ("x",)}, {"harmful": True}])
def test_another_reference_is_judged_anew_and_another_place_is_not(tmp_path: Path, change: dict[str, Any]) -> None:
    path, again, moved = tmp_path / "v.jsonl", Counting(), Counting()
    judged(path, Counting())
    judged(path, moved, rows=[replace(row, place="elsewhere") for row in ROWS])
    assert moved.asked == []
    judged(path, again, rows=[*ROWS[:2], replace(ROWS[2], **change), *ROWS[3:]])
    assert len(again.asked) == 3


def test_foreign_lines_among_the_verdicts_are_no_verdicts(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    expected = judged(path, Counting())
    whole = path.read_bytes()
    for foreign in (b"{}", b"3", b"[]", b"x", whole.splitlines()[0].replace(b'"verdict"', b'"view"')):
        path.write_bytes(foreign + b"\n" + whole)
        assert judged(path, Counting()) == expected, foreign
        assert path.read_bytes() == whole
