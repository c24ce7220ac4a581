"""Read every source of a run and split its rows: training and held-out rows by expert, and the extra evaluation sets.

Every record is accounted for: it becomes a row, or it is dropped with a reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from alignx_ds.config.schema import AxisConfig, GeneralistConfig, RunConfig
from alignx_ds.config.sources import training_sources
from alignx_ds.data.columns import Records
from alignx_ds.data.parsers import Parsed
from alignx_ds.data.rows import Dropped, Row
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.sources import Source
from alignx_ds.errors import DataError

Use = Literal["train", "held out", "set"]
# Of rows of an expert or a set, and their use: why each is too long, or nothing.
TooLong = Callable[[Use, str, list[Row]], list[str]]
CHUNK = 1000  # rows that are encoded at a time, until there are as many as a limit allows
HELD_OUT = "held out"  # the salt of the hash that cuts a source into training and held-out rows


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split of a source, or of several, and the records that were dropped."""

    source: str
    records: int  # before any was dropped
    rows: list[Row]
    dropped: list[Dropped]
    by_source: tuple[tuple[str, int], ...] = ()  # where there are several sources: the number of rows of each

    def reasons(self) -> Counter[str]:
        return Counter(d.reason for d in self.dropped)

    def without(self, unwanted: dict[int, str]) -> SplitRows:
        """The split less the rows at these indices; each is recorded as dropped for the reason given with it."""
        remaining = [row for i, row in enumerate(self.rows) if i not in unwanted]
        removed = [Dropped(self.rows[i].place, reason) for i, reason in unwanted.items()]
        return replace(self, rows=remaining, dropped=[*self.dropped, *removed])

    @classmethod
    def of(cls, source: str, records: Records, parsed: Parsed) -> SplitRows:
        count = len(records.usable) + len(records.dropped)
        return cls(source, count, parsed.rows, [*records.dropped, *parsed.dropped])


def mixed(parts: Sequence[SplitRows], weights: Sequence[float], limit: int, *, exact: bool) -> SplitRows:
    """One split of several sources, in turn and in the proportion of their weights, with `limit` rows at most.

    If the proportion is to be `exact`, it ends with the source that is used up first. Otherwise the others go on.
    """
    turns = sorted(
        ((n + 0.5) / weight, number, n)
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True))
        for n in range(len(part.rows))
    )
    last = min(len(part.rows) / weight for part, weight in zip(parts, weights, strict=True)) if exact else math.inf
    rows: list[Row] = []
    counts = [0] * len(parts)
    dropped = [dropped for part in parts for dropped in part.dropped]
    for turn, number, n in turns:
        row = parts[number].rows[n]
        if turn > last:
            dropped.append(Dropped(row.place, "more than its source's weight allows"))
        elif len(rows) == limit:
            dropped.append(Dropped(row.place, f"more than {limit} rows"))
        else:
            rows.append(row)
            counts[number] += 1
    names = [part.source for part in parts]
    records = sum(part.records for part in parts)
    return SplitRows(", ".join(names), records, rows, dropped, tuple(zip(names, counts, strict=True)))


@dataclass(frozen=True)
class Sources:
    """All rows of a run, before any limit. `train` and `held_out` by expert, a part for each of its sources."""

    train: dict[str, list[SplitRows]]
    held_out: dict[str, list[SplitRows]]
    sets: dict[str, SplitRows]


@dataclass(frozen=True)
class DataSplits:
    """`train` and `held_out` by expert, the generalist first; an expert without a source has empty splits.

    `sets` holds the extra evaluation sets by name.
    """

    train: dict[str, SplitRows]
    held_out: dict[str, SplitRows]
    sets: dict[str, SplitRows]
    judged_questions: frozenset[str]  # of all held-out rows, those beyond data.held_out_rows too: never trained on


def read_splits(config: RunConfig) -> DataSplits:
    """The splits when no row is too long. Raises DataError naming file, row and column."""
    return limited(read_sources(config), config)


def read_sources(config: RunConfig) -> Sources:
    """Read, parse and split every source by question. Raises DataError naming file, row and column."""
    train, held_out = {}, {}
    for name, settings in _experts(config).items():
        train[name], held_out[name] = _read_source(name, settings, config)
    return Sources(train, held_out, {name: _read_set(name, config) for name in config.evaluation.sets})


def limited(sources: Sources, config: RunConfig, too_long: TooLong | None = None) -> DataSplits:
    """The rows that a run uses: none that is too long, none that is trained on and judged, as many as the limits allow.

    Rows that are too long do not count towards a limit. Raises DataError for a source that is left without rows.
    """
    judged = frozenset(row.question for parts in sources.held_out.values() for part in parts for row in part.rows)
    train, held_out = {}, {}
    for name, settings in _experts(config).items():
        parts = [part.without(_leaked(part, judged)) for part in sources.train[name]]
        weights = [source.weight for source in training_sources(settings)]
        train[name] = _used(parts, _train_limit(settings, config), "train", name, too_long, weights)
        held_out[name] = _used(sources.held_out[name], config.data.held_out_rows, "held out", name, too_long)
    trained = frozenset(question for split in train.values() for row in split.rows for question in row.questions)
    sets = {}
    for name, split in sources.sets.items():
        known = {i: "its question is trained on" for i, row in enumerate(split.rows) if row.question in trained}
        sets[name] = _used([split.without(known)], _set_limit(name, config), "set", name, too_long)
    judged |= {row.question for split in sets.values() for row in split.rows}
    return DataSplits(train, held_out, sets, judged)


def _experts(config: RunConfig) -> dict[str, AxisConfig | GeneralistConfig]:
    return {"generalist": config.generalist, **config.axes}


def _read_source(
    name: str, s: AxisConfig | GeneralistConfig, config: RunConfig
) -> tuple[list[SplitRows], list[SplitRows]]:
    """Training and held-out rows. Without a held-out source, a share of each source's questions is held out."""
    seed, limit, share = config.seed, config.data.records, config.data.held_out_share
    train_parts, held_out_parts = [], []
    for given in training_sources(s):
        schema = SCHEMAS[given.schema]
        source = Source(given.source, given.schema, given.columns)
        train = source.read(held_out=False, count=_train_limit(s, config), seed=seed, limit=limit)
        if not s.held_out:
            positions = [Row(schema.question(record), "").position(HELD_OUT) for _, record in train.usable]
            cut = [record for record, position in zip(train.usable, positions, strict=True) if position < share]
            held_out_parts.append(SplitRows.of(given.source, Records(cut, []), schema.held_out(cut)))
            rest = [record for record, position in zip(train.usable, positions, strict=True) if position >= share]
            train = Records(rest, train.dropped)
        train_parts.append(SplitRows.of(given.source, train, schema.parse(train.usable)))
    if not s.held_out:
        _check_held_out(name, train_parts, held_out_parts, share)
        return train_parts, [part for part in held_out_parts if part.records] or held_out_parts[:1]
    source = Source(s.held_out, *s.judged_as())
    held_out = source.read(held_out=True, count=config.data.held_out_rows, seed=seed, limit=limit)
    parsed = SCHEMAS[s.judged_as()[0]].held_out(held_out.usable)
    return train_parts, [SplitRows.of(s.held_out, held_out, parsed)]


def _check_held_out(name: str, train: list[SplitRows], held_out: list[SplitRows], share: float) -> None:
    """Raises DataError where the share of the questions that is to be held out is none."""
    questions = {row.question for part in train for row in part.rows}
    if questions and not any(part.records for part in held_out):
        sources = ", ".join(part.source for part in train)
        found = f"none of its {len(questions)} questions falls into the held-out share of {share}"
        fix = "give more rows or a held_out source, or raise data.held_out_share"
        raise DataError(f"{sources} ({name}): no usable row held out: {found}; {fix}")


def _read_set(name: str, config: RunConfig) -> SplitRows:
    """An extra evaluation set."""
    s = config.evaluation.sets[name]
    source = Source(s.source, s.schema, s.columns)
    records = source.read(held_out=True, count=_set_limit(name, config), seed=config.seed)
    return SplitRows.of(s.source, records, SCHEMAS[s.schema].held_out(records.usable))


def _train_limit(s: AxisConfig | GeneralistConfig, config: RunConfig) -> int:
    return (s.rows if isinstance(s, AxisConfig) else 0) or config.data.train_rows


def _set_limit(name: str, config: RunConfig) -> int:
    return config.evaluation.sets[name].rows or config.data.held_out_rows


def _leaked(split: SplitRows, judged: frozenset[str]) -> dict[int, str]:
    """The rows with a question that is held out, also as an earlier turn."""
    rows = enumerate(split.rows)
    return {i: "its question is held out" for i, row in rows if not judged.isdisjoint(row.questions)}


def _used(
    parts: Sequence[SplitRows],
    limit: int,
    use: Use,
    name: str,
    too_long: TooLong | None,
    weights: Sequence[float] = (),
) -> SplitRows:
    """The first rows of an expert's sources that are not too long. Raises DataError for a source without any."""
    fitting = [_first_rows(part, limit, use, name, too_long) for part in parts]
    if len(fitting) < 2:
        return fitting[0] if fitting else SplitRows("", 0, [], [])
    return mixed(fitting, weights if any(weights) else [len(part.rows) for part in parts], limit, exact=any(weights))


def _first_rows(split: SplitRows, limit: int, use: Use, name: str, too_long: TooLong | None) -> SplitRows:
    """The first `limit` rows that are not too long."""
    unwanted: dict[int, str] = {}
    used = 0
    for start in range(0, len(split.rows), CHUNK):
        rows = split.rows[start : start + CHUNK]
        reasons = too_long(use, name, rows) if too_long is not None and used < limit else [""] * len(rows)
        for i, reason in enumerate(reasons, start=start):
            if reason or used == limit:
                unwanted[i] = reason or f"more than {limit} rows"
            else:
                used += 1
    left = split.without(unwanted)
    if used:
        return left
    where = f"{split.source} ({name})"
    if split.rows:
        raise DataError(f"{where}: all {len(split.rows)} rows are {unwanted[0]}; raise model.max_length")
    what = {"train": " to train on", "held out": " held out", "set": ""}[use]
    raise DataError(f"{where}: no usable row{what}{_why_empty(left)}")


def _why_empty(split: SplitRows) -> str:
    counts = ", ".join(f"{count} × {reason}" for reason, count in split.reasons().most_common())
    why = f" of {split.records} records ({counts})" if counts else ": the source is empty"
    return f"{why}; give a source with usable rows"
