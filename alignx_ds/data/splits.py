"""Read every source of a run and split its rows: training and held-out rows by expert, and the extra evaluation sets.

Every record is accounted for: it becomes a row, or it is dropped with a reason.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from alignx_ds.config.schema import AxisConfig, GeneralistConfig, RunConfig
from alignx_ds.data.columns import Records
from alignx_ds.data.parsers import Parsed
from alignx_ds.data.rows import Dropped, Row
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.sources import Source
from alignx_ds.errors import DataError

HELD_OUT = "held out"  # the salt of the hash that cuts a source into training and held-out rows


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split of one source, and the records of that source that were dropped."""

    source: str
    records: int  # before any was dropped
    rows: list[Row]
    dropped: list[Dropped]

    def reasons(self) -> Counter[str]:
        return Counter(d.reason for d in self.dropped)

    def without(self, unwanted: dict[int, str]) -> SplitRows:
        """The split less the rows at these indices; each is recorded as dropped for the reason given with it."""
        remaining = [row for i, row in enumerate(self.rows) if i not in unwanted]
        removed = [Dropped(self.rows[i].place, reason) for i, reason in unwanted.items()]
        return SplitRows(self.source, self.records, remaining, [*self.dropped, *removed])

    @classmethod
    def of(cls, source: str, records: Records, parsed: Parsed) -> SplitRows:
        count = len(records.usable) + len(records.dropped)
        return cls(source, count, parsed.rows, [*records.dropped, *parsed.dropped])


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
    """Read, parse and split every source by question. Raises DataError naming file, row and column."""
    sources: dict[str, AxisConfig | GeneralistConfig] = {"generalist": config.generalist, **config.axes}
    train, held_out = {}, {}
    for name, settings in sources.items():
        train[name], held_out[name] = _read_source(settings, config)
    judged = frozenset(row.question for split in held_out.values() for row in split.rows)
    for name, settings in sources.items():
        rows = enumerate(train[name].rows)
        leaked = {i: "its question is held out" for i, row in rows if not judged.isdisjoint(row.questions)}
        train[name] = _first_rows(train[name].without(leaked), _train_limit(settings, config))
        held_out[name] = _first_rows(held_out[name], config.data.held_out_rows)
        for split, use in ((train[name], "to train on"), (held_out[name], "held out")):
            if split.source and not split.rows:
                raise DataError(f"{split.source} ({name}): no usable row {use}{_why_empty(split)}")
    trained = frozenset(question for split in train.values() for row in split.rows for question in row.questions)
    sets = {name: _read_set(name, config, trained) for name in config.evaluation.sets}
    judged |= {row.question for split in sets.values() for row in split.rows}
    return DataSplits(train, held_out, sets, judged)


def _read_source(s: AxisConfig | GeneralistConfig, config: RunConfig) -> tuple[SplitRows, SplitRows]:
    """Training and held-out rows. Without a held-out source, a share of the training source's questions is held out."""
    if not s.train:
        return SplitRows("", 0, [], []), SplitRows("", 0, [], [])
    schema = held_out_schema = SCHEMAS[s.schema]
    seed, limit = config.seed, config.data.records
    source = Source(s.train, s.schema, s.columns)
    train = source.read(held_out=False, count=_train_limit(s, config), seed=seed, limit=limit)
    if s.held_out:
        held_out_schema = SCHEMAS[s.judged_as()[0]]
        source = Source(s.held_out, *s.judged_as())
        held_out = source.read(held_out=True, count=config.data.held_out_rows, seed=seed, limit=limit)
    else:
        positions = [Row(schema.question(record), "").position(HELD_OUT) for _, record in train.usable]
        share = config.data.held_out_share
        cut = [record for record, position in zip(train.usable, positions, strict=True) if position < share]
        held_out = Records(cut, [])
        rest = [record for record, position in zip(train.usable, positions, strict=True) if position >= share]
        train = Records(rest, train.dropped)
    return (
        SplitRows.of(s.train, train, schema.parse(train.usable)),
        SplitRows.of(s.held_out or s.train, held_out, held_out_schema.held_out(held_out.usable)),
    )


def _read_set(name: str, config: RunConfig, trained: frozenset[str]) -> SplitRows:
    """An extra evaluation set, less the questions that are trained on."""
    s = config.evaluation.sets[name]
    limit = s.rows or config.data.held_out_rows
    records = Source(s.source, s.schema, s.columns).read(held_out=True, count=limit, seed=config.seed)
    split = SplitRows.of(s.source, records, SCHEMAS[s.schema].held_out(records.usable))
    leaked = {i: "its question is trained on" for i, row in enumerate(split.rows) if row.question in trained}
    split = _first_rows(split.without(leaked), limit)
    if not split.rows:
        raise DataError(f"{s.source} ({name}): no usable row{_why_empty(split)}")
    return split


def _train_limit(s: AxisConfig | GeneralistConfig, config: RunConfig) -> int:
    return (s.rows if isinstance(s, AxisConfig) else 0) or config.data.train_rows


def _first_rows(split: SplitRows, limit: int) -> SplitRows:
    return split.without(dict.fromkeys(range(limit, len(split.rows)), f"more than {limit} rows"))


def _why_empty(split: SplitRows) -> str:
    counts = ", ".join(f"{count} × {reason}" for reason, count in split.reasons().most_common())
    why = f" of {split.records} records ({counts})" if counts else ": the source is empty"
    return f"{why}; give a source with usable rows"
