"""Read every source of a run and split its rows: training, held-out and routing rows by expert, and the extra sets.

Every record is accounted for: it becomes a row, or it is dropped with a reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignx_ds.config.schema import AxisConfig, GeneralistConfig, RunConfig
from alignx_ds.config.sources import training_sources
from alignx_ds.data.columns import Records
from alignx_ds.data.routing import RoutingRows, gated, more_needs, read_routing
from alignx_ds.data.rows import Row
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.sources import Source
from alignx_ds.data.split_rows import HELD_OUT, SplitRows, TooLong, leaked, of_wrong_kind, refusing, used
from alignx_ds.errors import DataError


@dataclass(frozen=True)
class Sources:
    """All rows of a run, before any limit. `train` and `held_out` by expert, a part for each of its sources."""

    train: dict[str, list[SplitRows]]
    held_out: dict[str, list[SplitRows]]
    sets: dict[str, SplitRows]
    routing: list[RoutingRows]


@dataclass(frozen=True)
class DataSplits:
    """`train` and `held_out` by expert, the generalist first; an expert without a source has empty splits.

    `sets` holds the extra evaluation sets by name.
    """

    train: dict[str, SplitRows]
    held_out: dict[str, SplitRows]
    sets: dict[str, SplitRows]
    judged_questions: frozenset[str]  # of all held-out rows, those beyond data.held_out_rows too: never trained on
    routing: tuple[RoutingRows, ...] = ()  # by source: prompts that the gate alone learns from


def read_splits(config: RunConfig) -> DataSplits:
    """The splits when no row is too long. Raises DataError naming file, row and column."""
    return limited(read_sources(config), config)


def read_sources(config: RunConfig) -> Sources:
    """Read, parse and split every source by question. Raises DataError naming file, row and column."""
    train, held_out = {}, {}
    for name, settings in _experts(config).items():
        train[name], held_out[name] = _read_source(name, settings, config)
    sets = {name: _read_set(name, config) for name in config.evaluation.sets}
    return Sources(train, held_out, sets, read_routing(config))


def limited(sources: Sources, config: RunConfig, too_long: TooLong | None = None) -> DataSplits:
    """The rows that a run uses: none that is too long, none that is trained on and judged, as many as the limits allow.

    Rows that are too long do not count towards a limit. Raises DataError for a source that is left without rows.
    """
    judged = frozenset(row.question for parts in sources.held_out.values() for part in parts for row in part.rows)
    train, held_out = {}, {}
    for name, settings in _experts(config).items():
        parts = [part.without(leaked(part, judged)) for part in sources.train[name]]
        weights = [source.weight for source in training_sources(settings)]
        train[name] = used(parts, _train_limit(settings, config), "train", name, too_long, weights)
        held_out[name] = used(sources.held_out[name], config.data.held_out_rows, "held out", name, too_long)
    routing = gated(sources.routing, train, judged, config, too_long)
    train, held_out = more_needs(train, sources.routing), more_needs(held_out, sources.routing)
    gate_rows = [part.train for part in routing]
    trained = frozenset(q for split in (*train.values(), *gate_rows) for row in split.rows for q in row.questions)
    sets = {}
    for name, split in sources.sets.items():
        known = {i: "its question is trained on" for i, row in enumerate(split.rows) if row.question in trained}
        sets[name] = used([split.without(known)], _set_limit(name, config), "set", name, too_long)
    judged |= {row.question for split in sets.values() for row in split.rows}
    return DataSplits(train, held_out, sets, judged, tuple(routing))


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
        part = SplitRows.of(given.source, train, schema.parse(train.usable))
        train_parts.append(refusing(part, s.refusals) if isinstance(s, AxisConfig) else part)
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
    split = SplitRows.of(s.source, records, SCHEMAS[s.schema].held_out(records.usable))
    return split.without({i: why for i, row in enumerate(split.rows) if (why := of_wrong_kind(row, s.only))})


def _train_limit(s: AxisConfig | GeneralistConfig, config: RunConfig) -> int:
    return (s.rows if isinstance(s, AxisConfig) else 0) or config.data.train_rows


def _set_limit(name: str, config: RunConfig) -> int:
    return config.evaluation.sets[name].rows or config.data.held_out_rows
