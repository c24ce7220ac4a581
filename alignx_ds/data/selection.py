"""Which questions to train on: the best by a score, none much like another one that is kept.

DEITA's order (Liu et al. 2023, arXiv 2312.15685): the pool is sorted by score, and a question is kept unless its
cosine with one that was kept before reaches a limit, until there are as many as wanted. Without scores the pool keeps
the order of its files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignx_ds.data.rows import Row

BLOCK = 512  # questions that are compared with the kept ones at a time

Vectors = Any  # [N, d], dense or sparse, of length 1 or 0
Encoder = Callable[[Sequence[str]], Vectors]


@dataclass(frozen=True)
class Choice:
    """What became of a question: kept, too `like` another one (its number) by this `cosine`, or not among the best."""

    kept: bool
    like: int | None = None
    cosine: float = 0.0


def choose(
    vectors: Vectors, scores: Sequence[float], harmful: Sequence[bool], similar: float, most: int = 0
) -> list[Choice]:
    """By question. `similar`: the cosine from which two are alike; `most`: how many may be kept (0: any number).

    A question that asks for harm and one that does not are never alike: what tells them apart is worth learning.
    """
    asks = np.array(harmful)
    order = sorted(range(len(scores)), key=lambda number: (-scores[number], number))
    found = [Choice(kept=False)] * len(scores)
    kept: list[int] = []
    for start in range(0, len(order), BLOCK):
        block, before = order[start : start + BLOCK], list(kept)
        cosines = _cosines(vectors[block], vectors[[*before, *block]])
        cosines[asks[block][:, None] != asks[[*before, *block]]] = -1.0
        own: list[int] = []  # of the block's columns, those of questions that were kept
        for place, number in enumerate(block):
            if most and len(kept) == most:
                return found
            columns = [*range(len(before)), *own]
            nearest = max(columns, key=lambda column: cosines[place, column], default=None)
            if nearest is not None and cosines[place, nearest] >= similar:
                found[number] = Choice(False, [*before, *block][nearest], float(cosines[place, nearest]))
                continue
            found[number] = Choice(kept=True)
            kept.append(number)
            own.append(len(before) + place)
    return found


def _cosines(rows: Vectors, columns: Vectors) -> NDArray[np.float64]:
    product = rows @ columns.T
    return np.asarray(product if isinstance(product, np.ndarray) else product.toarray(), dtype=np.float64)


def tf_idf(texts: Sequence[str]) -> Vectors:
    """Words and pairs of words, weighed by their rarity among these texts: sparse, of length 1."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+").fit_transform(texts)


def by_question(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each question, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.question, []).append(row)
    return found
