"""The text of an explanation, of decisions made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from decisions import chosen

from alignx_ds.study.explain import plot, text
from alignx_ds.study.explain.explanation import Explained, Explanation


def test_a_confident_decision_and_an_even_one() -> None:
    confident, even = (" ".join(text.sentences(chosen(*c))) for c in ((0.95, 0.03, 0.02), (0.5, 0.5)))
    assert "Chosen expert: helpful, with 95.0 % confidence, 32 times that of the runner-up, harmless." in confident
    assert "Chosen expert: helpful, with 50.0 % confidence, 1.0 times that of" in even
    assert "Effective number of experts: 2.00 of 2 (entropy 1.00 of at most 1.00 bits)." in even
    margin = math.log(0.95 / 0.03) / 2
    assert f"Margin of the sum over that of harmless: {margin:.2f} (linear +1.73, lexical +0.00)." in confident
    words = "“dog” +0.50, “cat” −0.25; all others and the bias +0.12."
    assert f"Words and word pairs in the lexical margin, for helpful (+) or harmless (−): {words}" in confident


def test_a_confidence_is_never_rounded_to_0_or_100_percent() -> None:
    assert [text.percent(x) for x in (1.0, 0.9996, 0.9994, 0.0004, 0.0)] == [
        "> 99.9 %",
        "> 99.9 %",
        "99.9 %",
        "< 0.1 %",
        "< 0.1 %",
    ]
    said = " ".join(text.sentences(chosen(1.0, 1e-30)))
    assert "Chosen expert: helpful, with over 99.9 % confidence, over 10,000 times that of" in said
    assert text.times(1.0, 0.0) == "over 10,000 times"


def test_several_experts_that_serve_together_are_named() -> None:
    assert "Weights in the output: 50.0 % helpful and 50.0 % harmless." in " ".join(
        text.sentences(chosen(0.6, 0.4, top=2))
    )


def test_an_expert_without_rivals_has_no_runner_up() -> None:
    alone = replace(chosen(1.0), never=["generalist"], words=[])
    assert alone.runner_up is None and alone.margins() == {} and alone.entropy == alone.most_entropy == 0
    assert list(text.sentences(alone))[-1] == "The expert helpful is the only one with training rows."
    plot.draw(["a prompt"], [alone])


def test_a_long_answer_is_folded_and_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """Off a terminal a line has 120 characters."""
    words = [f"word{n}" for n in range(100)]
    explained = Explained("a prompt", [chosen(0.9, 0.1)], {"base": " ".join(words), "alignx": "first\nsecond"})
    text.show(Explanation("runs/x", "shared", [explained], {"helpful": "its files are not there"}), [])
    lines = capsys.readouterr().out.splitlines()
    assert [word for line in lines for word in line.split() if word in words] == words
    assert max(len(line) for line in lines if set(words) & set(line.split())) <= 120
    assert "alignx  first ⏎ second" in [line.strip() for line in lines]
    assert "no answer from helpful: its files are not there" in lines
