"""Rows: their digest, and splits by question."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignx_ds.data.rows import Row, digest, split_by_question

QUESTIONS = st.lists(st.sampled_from([f"question {n}" for n in range(30)]), max_size=60)


def test_the_digest_depends_on_content_and_order_alone() -> None:
    first, other = ([Row(prompt, "b", place=f"row {prompt}") for prompt in prompts] for prompts in ("ab", "ac"))
    assert digest(first) == digest([replace(row, place="elsewhere") for row in first]), "the place does not count"
    assert len({digest(first), digest(other), digest(first[:1]), digest(first[::-1])}) == 4
    assert digest([Row("a", "b", harmful=True)]) != digest([Row("a", "b")])
    assert digest([Row("a", "b", incorrect=("c",))]) != digest([Row("a", "b")])


@given(prompts=QUESTIONS, share=st.floats(0.0, 1.0))
def test_no_question_is_in_both_parts(prompts: list[str], share: float) -> None:
    rows = [Row(prompt, f"answer {n}") for n, prompt in enumerate(prompts)]
    rest, cut = split_by_question(rows, share, "salt")
    assert not {r.question for r in rest} & {r.question for r in cut}
    assert sorted((*rest, *cut), key=rows.index) == rows


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
def test_the_second_part_has_the_share_that_was_asked_for(share: float) -> None:
    rows = [Row(f"question {n}", "answer") for n in range(4000)]
    _, cut = split_by_question(rows, share, "salt")
    assert len(cut) / len(rows) == pytest.approx(share, abs=0.03)


def test_splits_of_different_salts_are_independent() -> None:
    rows = [Row(f"question {n}", "answer") for n in range(4000)]
    rest, cut = split_by_question(rows, 0.5, "one")
    for part in (rest, cut):
        _, again = split_by_question(part, 0.5, "another")
        assert len(again) / len(part) == pytest.approx(0.5, abs=0.04)
