"""The plot of an explanation, of decisions made by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from decisions import chosen

from alignx_ds.study.explain import plot


def test_an_experts_bars_end_at_its_logit_relative_to_the_mean() -> None:
    choice = chosen(0.6, 0.3, 0.1)
    for candidate in choice.candidates:  # both terms pull the same way, so that they are stacked
        candidate.parts.update(dict.fromkeys(candidate.parts, candidate.logit / 4))
    terms, sure = plot.draw(["a prompt"], [choice]).axes
    mean = sum(c.logit for c in choice.candidates) / 3
    expected = [c.logit - mean for c in choice.candidates[::-1]]
    stacked = [sum(bars[i].get_width() for bars in terms.containers) for i in range(3)]
    assert stacked == pytest.approx(expected)
    (marks,) = [line for line in terms.lines if line.get_label() == "sum"]
    assert list(marks.get_xdata()) == pytest.approx(expected)
    for i in range(3):  # no bar hides another
        spans = sorted(sorted((b[i].get_x(), b[i].get_x() + b[i].get_width())) for b in terms.containers)
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(spans))
    assert [bar.get_width() for bar in sure.containers[0]] == [0.1, 0.3, 0.6]
    assert [label.get_text() for label in terms.get_yticklabels()] == ["honest", "harmless", "helpful"]
