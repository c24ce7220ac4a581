"""The majority of hand-made answers, and the prompts of the fusions of texts."""

from __future__ import annotations

from alignx_ds.data.rows import Row, Turn
from alignx_ds.study.fused_texts import WORDINGS, fusion_prompt, is_tied, majority


def test_most_givers_win_whatever_their_likelihood() -> None:
    assert majority(["Paris.", "Rome", "paris"], [-5.0, -0.1, -9.0]) == 0
    assert majority(["Rome", "the  sea !", "The sea"], [-0.1, -5.0, -9.0]) == 1


def test_ties_are_broken_by_the_mean_log_likelihood_of_a_group() -> None:
    assert majority(["a", "b", "c"], [-2.0, -0.5, -1.0]) == 1
    assert majority(["a", "b", "b", "a"], [-0.1, -1.0, -1.2, -3.0]) == 1  # −1.1 against −1.55
    assert majority(["a", "b", "b", "a", "c"], [-0.9, -1.0, -1.2, -0.9, -0.1]) == 0


def test_a_vote_is_tied_where_no_answer_leads() -> None:
    assert is_tied(["a", "b", "c"]) and is_tied(["a", "b", "a", "b"])
    assert not is_tied(["a", "b", "A."]) and not is_tied(["a"])


def test_punctuation_within_an_answer_counts() -> None:
    assert is_tied(["1.5", "15"]) and not is_tied(["1.5", "1.5."])


def test_a_prompt_has_the_dialogue_the_request_and_every_answer_once() -> None:
    before = (Turn("system", "be brief"), Turn("user", "hello"), Turn("assistant", "hello you"))
    row = Row("what is {this} ?", "", before=before)
    for wording in WORDINGS.values():
        *earlier, last = fusion_prompt(wording, row, ["a {cat}", "two\nlines"])
        assert tuple(earlier) == before and last.role == "user"
        assert [last.text.count(part) for part in (row.prompt, "1. a {cat}", "2. two\nlines")] == [1, 1, 1]
