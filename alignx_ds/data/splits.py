"""Read every source of a run and split its rows: training, held-out and routing rows by expert, and the extra sets.

Every record is accounted for: it becomes a row, or it is dropped with a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from alignx_ds.config.schema import AxisConfig, GeneralistConfig, RunConfig
from alignx_ds.config.sources import training_sources
from alignx_ds.data.columns import Records
from alignx_ds.data.contamination import EvaluationPrompts, left_out, near_duplicates
from alignx_ds.data.routing import RoutingRows, gated, more_needs, read_routing
from alignx_ds.data.rows import Row
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.sources import Source
from alignx_ds.data.split_rows import HELD_OUT, SplitRows, TooLong, leaked, needing, of_wrong_kind, refusing, used
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
    # What training rows were compared with; empty where the recipe does not ask for that.
    compared_with: tuple[EvaluationPrompts, ...] = field(default=(), compare=False)

    def judges(self, row: Row) -> bool:
        """Whether a row's question, or one that is like it, is judged."""
        exactly = not self.judged_questions.isdisjoint(row.questions)
        return exactly or any(prompts.like(row) is not None for prompts in self.compared_with)

    def decontamination(self) -> dict[str, int] | None:
        """Prompts that training rows were compared with, the rows that were left out; None: nothing was compared."""
        if not self.compared_with:
            return None
        trained = [*self.train.values(), *(part.train for part in self.routing)]
        prompts = sum(len(known.kinds) for known in self.compared_with)
        return {"prompts": prompts, "near_duplicates": sum(map(left_out, trained))}


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

    Rows that are too long do not count towards a limit. With `data.decontaminate`, no training row is a near-duplicate
    of a prompt that is judged. Raises DataError for a source that is left without rows.
    """
    judged = frozenset(row.question for parts in sources.held_out.values() for part in parts for row in part.rows)
    kept = {name: [part.without(leaked(part, judged)) for part in parts] for name, parts in sources.train.items()}
    sources = replace(sources, train=kept)
    if not config.data.decontaminate:
        return _chosen(sources, config, judged, too_long)
    held_out = EvaluationPrompts(
        {f"a held-out prompt of {n}": [r for p in parts for r in p.rows] for n, parts in sources.held_out.items()}
    )
    sources = _decontaminated(sources, held_out, judged)
    splits = _chosen(sources, config, judged, too_long)
    # Sets and held-out routing rows have lost what is trained on word for word. Nothing like the rest is trained on.
    measured = {f"a prompt of set {name}": split.rows for name, split in splits.sets.items()}
    measured |= {f"a held-out routing prompt of {part.name}": part.held_out.rows for part in splits.routing}
    others = EvaluationPrompts(measured)
    cleaned = _decontaminated(sources, others, judged)
    if cleaned != sources:
        splits = _chosen(cleaned, config, judged, too_long, measured_on=splits)
    return replace(splits, compared_with=(held_out, others))


def _chosen(
    sources: Sources,
    config: RunConfig,
    judged: frozenset[str],
    too_long: TooLong | None,
    measured_on: DataSplits | None = None,
) -> DataSplits:
    """As many rows as the limits allow; `judged` are the held-out questions.

    The sets and held-out routing rows are those of `measured_on`, if given.
    """
    train, held_out = {}, {}
    for name, settings in _experts(config).items():
        weights = [source.weight for source in training_sources(settings)]
        train[name] = used(sources.train[name], _train_limit(settings, config), "train", name, too_long, weights)
        held_out[name] = used(sources.held_out[name], config.data.held_out_rows, "held out", name, too_long)
    routing = gated(sources.routing, train, judged, config, too_long)
    train, held_out = more_needs(train, sources.routing), more_needs(held_out, sources.routing)
    if measured_on is None:
        sets = _sets(sources, config, train, routing, too_long)
    else:
        sets, known = measured_on.sets, measured_on.routing
        routing = [replace(part, held_out=other.held_out) for part, other in zip(routing, known, strict=True)]
    judged |= {row.question for split in sets.values() for row in split.rows}
    return DataSplits(train, held_out, sets, judged, tuple(routing))


def _sets(
    sources: Sources,
    config: RunConfig,
    train: dict[str, SplitRows],
    routing: Sequence[RoutingRows],
    too_long: TooLong | None,
) -> dict[str, SplitRows]:
    """The extra sets, without the questions of training and routing rows."""
    gate_rows = [part.train for part in routing]
    trained = frozenset(q for split in (*train.values(), *gate_rows) for row in split.rows for q in row.questions)
    sets = {}
    for name, split in sources.sets.items():
        known = {i: "its question is trained on" for i, row in enumerate(split.rows) if row.question in trained}
        sets[name] = used([split.without(known)], _set_limit(name, config), "set", name, too_long)
    return sets


def _decontaminated(sources: Sources, prompts: EvaluationPrompts, judged: frozenset[str]) -> Sources:
    """Without the training and routing rows that are near-duplicates of these prompts.

    Routing rows with a held-out question to the letter, one of `judged`, are left to `gated`, which says so.
    """

    def clean(split: SplitRows) -> SplitRows:
        near = near_duplicates(split, prompts)
        return split.without({i: why for i, why in near.items() if judged.isdisjoint(split.rows[i].questions)})

    train = {name: [clean(part) for part in parts] for name, parts in sources.train.items()}
    return replace(sources, train=train, routing=[replace(part, train=clean(part.train)) for part in sources.routing])


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
            held_out = SplitRows.of(given.source, Records(cut, []), schema.held_out(cut))
            if given.needs:
                held_out = _of_the_expert(needing(held_out, given.needs), name)
            if held_out.rows or not given.needs:  # a source may have no row that the axis is judged by
                held_out_parts.append(held_out)
            rest = [record for record, position in zip(train.usable, positions, strict=True) if position >= share]
            train = Records(rest, train.dropped)
        part = needing(SplitRows.of(given.source, train, schema.parse(train.usable)), given.needs)
        train_parts.append(refusing(part, s.refusals) if isinstance(s, AxisConfig) else part)
    if not s.held_out:
        _check_held_out(name, train_parts, held_out_parts, share)
        return train_parts, [part for part in held_out_parts if part.records] or held_out_parts[:1]
    source = Source(s.held_out, *s.judged_as())
    records = source.read(held_out=True, count=config.data.held_out_rows, seed=seed, limit=limit)
    parsed = SCHEMAS[s.judged_as()[0]].held_out(records.usable)
    return train_parts, [SplitRows.of(s.held_out, records, parsed)]


def _of_the_expert(split: SplitRows, name: str) -> SplitRows:
    """The split less the rows whose prompts need others, which say nothing about this expert's answers."""
    others = (i for i, row in enumerate(split.rows) if row.needs and name not in row.needs)
    return split.without(dict.fromkeys(others, "its prompt needs another expert"))


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
