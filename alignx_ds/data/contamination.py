"""Training prompts that say the same as an evaluation prompt, though not to the letter: near-duplicates.

Prompts are compared as words, regardless of case, punctuation and typography. A training prompt is a near-duplicate of
an evaluation prompt that has

- the same words,
- the same words in the same order without function words ("how", "the", "you"), if CONTENT or more others are left, or
- RUN words or more, of which a share of SHARED or more lies in runs of RUN words that the training prompt has too
  (GPT-3's runs of 13 words, arXiv 2005.14165, counted as by Tülu 3, arXiv 2411.15124).

Short prompts are not compared by runs: "what is the capital of Peru" and "... of Chile" are two questions.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from alignx_ds.data.rows import Row
from alignx_ds.data.split_rows import SplitRows

RUN, SHARED, CONTENT = 13, 0.5, 2
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+")  # of Chinese and Japanese, each character
# Articles, pronouns, auxiliaries and what begins a request. Others tell questions apart: "not", "why", "to" and "from".
FUNCTION_WORDS = frozenset(
    """a an the i me my you your we us our it its he him his she her they them their this that these those
    am is are was were be been do does did can could will would shall should may might must have has had
    what which how please s d m ll re ve""".split()
)
NEAR = "near-duplicate of "  # begins the reason for which such a row is dropped
Words = tuple[str, ...]


def words(text: str) -> Words:
    return tuple(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


class EvaluationPrompts:
    """An index of evaluation prompts: to look a training row up takes as long for a few prompts as for many."""

    def __init__(self, rows: Mapping[str, Sequence[Row]]) -> None:
        """`rows` by what they are, e.g. "a held-out prompt of honest"."""
        self.kinds: list[str] = []  # by number of the prompt
        self._lengths: list[int] = []  # in words
        self._whole: dict[Words, int] = {}
        self._runs: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by hash: prompts, and where in them
        for kind, row in ((kind, row) for kind, listed in rows.items() for row in listed):
            self._add(kind, _asked(row))

    def _add(self, kind: str, turns: list[Words]) -> None:
        number, whole = len(self.kinds), sum(turns, ())
        self.kinds.append(kind)
        self._lengths.append(len(whole))
        for form in _forms(whole):
            self._whole.setdefault(form, number)
        for start, run in _runs(whole):
            self._runs[run].append((number, start))

    def like(self, row: Row) -> int | None:
        """The number of the evaluation prompt that a training row asks, as its prompt or in one of its turns."""
        turns = _asked(row)
        whole = sum(turns, ())
        same = (self._whole.get(form) for asked in (whole, *turns) for form in _forms(asked))
        found = next((number for number in same if number is not None), None)
        return self._with_runs_of(whole) if found is None else found

    def _with_runs_of(self, asked: Words) -> int | None:
        covered: dict[int, set[int]] = defaultdict(set)
        for _, run in _runs(asked):
            for number, start in self._runs.get(run, ()):
                covered[number].update(range(start, start + RUN))
        return min((n for n, places in covered.items() if len(places) >= SHARED * self._lengths[n]), default=None)


def near_duplicates(split: SplitRows, prompts: EvaluationPrompts) -> dict[int, str]:
    """The rows of a training split that are like one of these prompts, each with the reason to drop it."""
    found = ((i, prompts.like(row)) for i, row in enumerate(split.rows))
    return {i: f"{NEAR}{prompts.kinds[number]}" for i, number in found if number is not None}


def left_out(split: SplitRows) -> int:
    """How many near-duplicates were dropped from a training split."""
    return sum(count for reason, count in split.reasons().items() if reason.startswith(NEAR))


def _asked(row: Row) -> list[Words]:
    return [words(turn.text) for turn in row.chat if turn.role == "user"]


def _forms(asked: Words) -> Iterator[Words]:
    """What equal questions have in common: all words, and those that are no function words."""
    if asked:
        yield asked
    content = tuple(word for word in asked if word not in FUNCTION_WORDS)
    if len(content) >= CONTENT:
        yield content


def _runs(asked: Words) -> Iterator[tuple[int, int]]:
    """(where it begins, its hash) of each run of words."""
    return ((start, hash(asked[start : start + RUN])) for start in range(len(asked) - RUN + 1))
