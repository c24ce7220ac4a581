"""Which questions are kept: the best by score, none like another one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import sparse

from alignx_ds.data import selection
from alignx_ds.data.rows import Row
from alignx_ds.data.selection import Choice, by_question, choose, tf_idf

ANGLES = [0, 10, 90, 95, 50]  # degrees, of questions on a circle
COSINE_30 = float(np.cos(np.radians(30)))


def circle(angles: list[int]) -> np.ndarray:
    turned = np.radians(angles)
    return np.stack([np.cos(turned), np.sin(turned)], axis=1)


def kept(choices: list[Choice]) -> list[int]:
    return [number for number, choice in enumerate(choices) if choice.kept]


def test_the_first_of_those_that_are_alike_is_kept() -> None:
    found = choose(circle(ANGLES), [1.0] * 5, [False] * 5, COSINE_30)
    assert kept(found) == [0, 2, 4]
    assert (found[1].like, found[3].like) == (0, 2)
    assert found[1].cosine == pytest.approx(np.cos(np.radians(10)))


def test_the_best_of_those_that_are_alike_is_kept_and_no_more_than_wanted() -> None:
    scores = [1.0, 2.0, 3.0, 4.0, 0.0]
    found = choose(circle(ANGLES), scores, [False] * 5, COSINE_30)
    assert kept(found) == [1, 3, 4]
    found = choose(circle(ANGLES), scores, [False] * 5, COSINE_30, most=2)
    assert kept(found) == [1, 3]
    assert found[2].like == 3 and found[4].like is None, "the last was not looked at any more"


def test_what_asks_for_harm_is_not_like_what_does_not() -> None:
    found = choose(circle([0, 0, 0, 0]), [1.0] * 4, [False, True, False, True], 0.9)
    assert kept(found) == [0, 1]
    assert (found[2].like, found[3].like) == (0, 1)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize("block", [1, 3, 512])
def test_blocks_change_nothing(block: int, form: type, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(40, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = random.integers(0, 3, size=40).tolist()
    monkeypatch.setattr(selection, "BLOCK", block)
    found = choose(form(vectors), scores, [False] * 40, 0.8)
    chosen: list[int] = []  # by the definition, one after the other
    for number in sorted(range(40), key=lambda i: (-scores[i], i)):
        if all(vectors[number] @ vectors[other] < 0.8 for other in chosen):
            chosen.append(number)
    assert kept(found) == sorted(chosen)
    assert all(vectors[a] @ vectors[b] < 0.8 for a, b in itertools.combinations(chosen, 2))


def test_questions_with_the_same_words_have_a_cosine_of_one() -> None:
    rows = [Row("How do I bake bread?", "so"), Row("how do i  bake bread?", "thus"), Row("How do I bake a cake?", "")]
    groups = by_question(rows)
    assert [len(of_one) for of_one in groups.values()] == [2, 1]
    vectors = tf_idf(["How do I bake bread?", "how do I bake bread", "where is the cake"])
    cosines = (vectors @ vectors.T).toarray()
    assert cosines[0, 1] == pytest.approx(1.0) and cosines[0, 2] < 0.2
