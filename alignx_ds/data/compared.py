"""Rows for objectives that learn from bad answers too: pairs of a good and a bad answer, or answers with a verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256

import numpy as np

from alignx_ds.config.schema import JUDGED, PAIRED, RunConfig
from alignx_ds.data.encode import Example, LabelledExamples, digest
from alignx_ds.data.encodings import Encodings
from alignx_ds.data.rows import Dropped, Row
from alignx_ds.data.split_rows import SplitRows
from alignx_ds.errors import DataError

LEAST, MOST = 0.5, 10.0  # bounds of the weights that match prompts, as in TRL


@dataclass(frozen=True)
class ComparedRows:
    """An axis's rows for its objective, with its system prompt.

    Pairs are good answers in `examples`, with a bad one each as their `others`; a good answer that is `alone` has no
    bad one, and its other counts for nothing. Otherwise `good` says of each answer whether it is; `mismatched` has
    another row's answer to its prompt, for kto; and `weights`, for bco, are what each answer counts.
    """

    examples: LabelledExamples
    good: list[bool] = field(default_factory=list)
    mismatched: list[Example] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    alone: list[bool] = field(default_factory=list)

    def reasons(self) -> Counter[str]:
        return Counter(d.reason for d in self.dropped)

    def __len__(self) -> int:
        return len(self.examples.examples)

    @property
    def digest(self) -> str:
        compared = digest([*self.examples.examples, *self.examples.others, *self.mismatched])
        return compared + sha256(bytes(self.alone if any(self.alone) else self.good)).hexdigest()


def compared_rows(config: RunConfig, splits: Mapping[str, SplitRows], encodings: Encodings) -> dict[str, ComparedRows]:
    """Of the rows by axis, for the objectives that need them. Raises DataError where there are none."""
    found = {}
    for axis, split in splits.items():
        settings = config.axes[axis]
        if settings.objective not in (*PAIRED, *JUDGED):
            continue
        make = partial(_pairs, imitated=settings.imitates()) if settings.objective in PAIRED else _verdicts
        rows = make(split.rows, settings.prompt, encodings, config.model.max_length)
        if all(rows.alone) and len(set(rows.good)) < 2:
            problem = f"no answer that fits is {'good' if rows.good and not rows.good[0] else 'bad'}"
            fix = f"give rows with both, or raise model.max_length, for axes.{axis}.objective={settings.objective}"
            raise DataError(f"{split.source} ({axis}): {problem}; {fix}")
        if settings.objective == "kto":
            rows = replace(rows, mismatched=_mismatched(rows.examples.examples, config.model.max_length))
        if settings.objective == "bco":
            rows = replace(rows, weights=_matching_weights(rows.examples.examples, rows.good))
        found[axis] = rows
    return found


def _pairs(rows: list[Row], system: str, encodings: Encodings, limit: int, *, imitated: bool) -> ComparedRows:
    """A row's answer beside each of the worse ones; without any, alone if it is to be `imitated`."""
    usable: list[tuple[Row, str]] = []
    dropped = []
    for row in rows:
        if reason := _unpaired(row, imitated=imitated):
            dropped.append(Dropped(row.place, reason))
        else:
            usable += [(row, bad) for bad in row.worse or ("",)]
    good = encodings.encode([row for row, _ in usable], system)
    bad = encodings.encode([replace(row, response=bad or row.response) for row, bad in usable], system)
    firsts: list[Example] = []
    others: list[Example] = []
    alone = []
    for (row, worse), a, b in zip(usable, good, bad, strict=True):
        if max(len(a.ids), len(b.ids)) > limit:
            dropped.append(_too_long(row, limit))
            continue
        firsts.append(a)
        others.append(b if worse else _begun(a))
        alone.append(not worse)
    return ComparedRows(LabelledExamples(firsts, [0] * len(firsts), others=others), dropped=dropped, alone=alone)


def _unpaired(row: Row, *, imitated: bool) -> str:
    """Why a row is of no use to an objective of pairs, or nothing."""
    if not row.response:
        return "without a good answer"
    return "" if row.worse or imitated else "without a bad answer; sft_weight above 0 would imitate the good one"


def _begun(example: Example) -> Example:
    """Its prompt and the first token of its answer: as short as a second answer can be."""
    return Example(example.ids[: example.prompt_length + 1], example.prompt_length, example.place)


def _verdicts(rows: list[Row], system: str, encodings: Encodings, limit: int) -> ComparedRows:
    """Every answer once, good or bad."""
    verdicts: dict[tuple[object, str], tuple[Row, bool]] = {}
    for row in rows:
        for answer, good in ((row.response, True), *((bad, False) for bad in row.worse)):
            if answer:
                verdicts.setdefault((row.chat, answer), (replace(row, response=answer), good))
    judged = list(verdicts.values())
    examples = encodings.encode([row for row, _ in judged], system)
    fitting = [len(e.ids) <= limit for e in examples]
    usable = [(e, good) for e, (_, good), fits in zip(examples, judged, fitting, strict=True) if fits]
    dropped = [_too_long(row, limit) for (row, _), fits in zip(judged, fitting, strict=True) if not fits]
    return ComparedRows(
        LabelledExamples([e for e, _ in usable], [0] * len(usable)), [good for _, good in usable], dropped=dropped
    )


def _too_long(row: Row, limit: int) -> Dropped:
    return Dropped(row.place, f"with one of its answers longer than model.max_length={limit} tokens")


def _mismatched(examples: list[Example], limit: int) -> list[Example]:
    """Each prompt with the answer of the row half of all rows further on: answers to one prompt are near each other."""
    made = []
    for number, example in enumerate(examples):
        other = examples[(number + len(examples) // 2) % len(examples)]
        ids = (*example.ids[: example.prompt_length], *other.ids[other.prompt_length :])
        made.append(Example(ids[:limit], example.prompt_length, example.place))
    return made


def _matching_weights(examples: list[Example], good: Sequence[bool]) -> list[float]:
    """BCO's underlying distribution matching: p(good | prompt) / p(bad | prompt) for a bad answer, 1 for a good one.

    The classifier is a logistic regression on the prompts' TF-IDF, in which both kinds weigh alike.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    prompts = [[str(i) for i in e.ids[: e.prompt_length]] for e in examples]
    features = TfidfVectorizer(analyzer=lambda tokens: tokens).fit_transform(prompts)
    odds = LogisticRegression(class_weight="balanced", max_iter=1000).fit(features, good).decision_function(features)
    ratios = np.exp(odds).clip(LEAST, MOST).round(4).tolist()
    return [1.0 if is_good else ratio for ratio, is_good in zip(ratios, good, strict=True)]
