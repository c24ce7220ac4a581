"""Routing rows: prompts that need an axis, or none, and that the gate alone learns from. Nothing of them is imitated.

Like other sources they are split by question, and nothing that is judged is fitted on. One prompt may be listed for
several axes: then it needs all of them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from alignx_ds.config.schema import RoutingSourceConfig, RunConfig
from alignx_ds.config.sources import RoutingSource, routing_sources, training_sources
from alignx_ds.data.rows import Dropped, Row, split_by_question
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.sources import Source
from alignx_ds.data.split_rows import HELD_OUT, SplitRows, TooLong, first_rows, leaked, of_wrong_kind

GENERALIST = "generalist"
Needs = dict[str, set[str]]  # by question: the axes for which it is listed


@dataclass(frozen=True)
class RoutingRows:
    """The rows of one source: `train` has those that the gate is fitted on, `held_out` those that it is measured on."""

    owner: str  # the expert for which the source is listed
    name: str  # of the source, for reports
    train: SplitRows
    held_out: SplitRows


def read_routing(config: RunConfig) -> list[RoutingRows]:
    """Read and split the sources of routing rows. Raises DataError naming file, row and column."""
    made: list[RoutingRows] = []
    numbers: dict[str, int] = defaultdict(int)
    for given in routing_sources(config):
        settings = given.settings
        source = Source(settings.source, settings.schema, settings.columns)
        seed, count = config.seed, config.data.train_rows
        records = source.read(held_out=False, count=count, seed=seed, limit=config.data.records)
        read = SplitRows.of(settings.source, records, SCHEMAS[settings.schema].held_out(records.usable))
        number = numbers[given.owner] = numbers[given.owner] + 1
        kept = _kept(read, given, first_number(given.owner, config) + number)
        parts = [
            replace(kept, rows=rows, dropped=kept.dropped if part == "train" else [])
            for part, rows in zip(
                ("train", HELD_OUT), split_by_question(kept.rows, config.data.held_out_share, HELD_OUT), strict=True
            )
        ]
        train, held_out = (replace(p, records=len(p.rows) + len(p.dropped)) for p in parts)
        name = _name(settings, given.owner, [part.name for part in made])
        made.append(RoutingRows(given.owner, name, train, held_out))
    return _labelled(made)


def first_number(owner: str, config: RunConfig) -> int:
    """The number of an expert's last source of training rows; those of its routing rows follow."""
    settings = config.generalist if owner == GENERALIST else config.axes[owner]
    return len(training_sources(settings)) - 1


def _name(settings: RoutingSourceConfig, owner: str, taken: Sequence[str]) -> str:
    """Of a source, unlike those `taken`. Reports are passed on, so it has no absolute path of this machine."""
    source = os.path.basename(settings.source) if os.path.isabs(settings.source) else settings.source
    name = f"{source}{f', {settings.only}' if settings.only else ''} ({owner})"
    return name if name not in taken else f"{name} {1 + sum(other.startswith(name) for other in taken)}"


def _kept(read: SplitRows, given: RoutingSource, number: int) -> SplitRows:
    """The prompts that are wanted, once each and without their answers; a row without needs has its owner's."""
    rows: dict[str, Row] = {}
    dropped: list[Dropped] = []
    for row in read.rows:
        if reason := _unwanted(row, given):
            dropped.append(Dropped(row.place, reason))
        elif row.question in rows:
            dropped.append(Dropped(row.place, "the same question as another row's"))
        else:
            needs = row.needs or (given.owner,)
            rows[row.question] = replace(row, response="", rejected="", needs=needs, source=number)
    return replace(read, rows=list(rows.values()), dropped=[*read.dropped, *dropped])


def _unwanted(row: Row, given: RoutingSource) -> str:
    if reason := of_wrong_kind(row, given.settings.only):
        return reason
    if given.owner == GENERALIST and set(row.needs) - {GENERALIST}:
        return "its prompt needs an axis"
    return ""


def _labelled(parts: list[RoutingRows]) -> list[RoutingRows]:
    """Each row with the needs of all sources that list its question; what is listed for an axis is no negative."""
    listed = _listed(parts)

    def labelled(split: SplitRows, owner: str) -> SplitRows:
        wanted = {i: "listed for an axis too" for i, row in enumerate(split.rows) if listed.get(row.question)}
        if owner == GENERALIST:
            return split.without(wanted)
        return replace(split, rows=list(_with_needs(split.rows, listed)))

    return [replace(p, train=labelled(p.train, p.owner), held_out=labelled(p.held_out, p.owner)) for p in parts]


def _listed(parts: Iterable[RoutingRows]) -> Needs:
    listed: Needs = defaultdict(set)
    for part in parts:
        for row in (*part.train.rows, *part.held_out.rows):
            listed[row.question] |= set(row.needs) - {GENERALIST}
    return listed


def _with_needs(rows: Sequence[Row], listed: Needs, owner: str = "") -> Iterator[Row]:
    """The rows, with the axes that their questions are listed for beside their own; `owner` of rows that name none."""
    for row in rows:
        own = set(row.needs or (owner,))
        more = listed.get(row.question, set()) - own
        yield replace(row, needs=tuple(sorted((own | more) - {GENERALIST}))) if more else row


def more_needs(splits: dict[str, SplitRows], routing: Sequence[RoutingRows]) -> dict[str, SplitRows]:
    """Splits by expert, whose rows also need the axes that their questions are listed for."""
    listed = _listed(routing)
    if not any(listed.values()):
        return splits
    return {name: replace(s, rows=list(_with_needs(s.rows, listed, name))) for name, s in splits.items()}


def gated(
    routing: Sequence[RoutingRows],
    train: Mapping[str, SplitRows],
    judged: frozenset[str],
    config: RunConfig,
    too_long: TooLong | None,
) -> list[RoutingRows]:
    """The routing rows that a run uses: none that is too long, held out elsewhere, or a training row of its expert.

    `train` are the training rows by expert, `judged` the questions of the held-out rows. Raises DataError for a source
    that is left without a row to fit the gate on.
    """
    own = {name: {row.question for row in split.rows} for name, split in train.items()}
    trained_by: Needs = defaultdict(set)
    for name, questions in own.items():
        for question in questions if name != GENERALIST else ():
            trained_by[question].add(name)
    measured = judged | {row.question for part in routing for row in part.held_out.rows}
    used = []
    for part in routing:
        known = own[part.owner] | (trained_by.keys() if part.owner == GENERALIST else set())
        rows = _without(part.train, known, "its question is a training row's")
        rows = replace(rows, rows=list(_with_needs(rows.rows, trained_by)))
        rows = rows.without(leaked(rows, measured))
        fitted = first_rows(rows, config.data.train_rows, "routing", part.owner, too_long)
        used.append(replace(part, train=fitted))
    seen = {q for name in train for q in own[name]} | {row.question for part in used for row in part.train.rows}
    return [replace(part, held_out=_measured(part, seen, config, too_long)) for part in used]


def _measured(part: RoutingRows, seen: set[str], config: RunConfig, too_long: TooLong | None) -> SplitRows:
    """Held-out rows that nothing is fitted on; a small source may have none."""
    rows = _without(part.held_out, seen, "its question is trained on")
    reasons = too_long("routing", part.owner, rows.rows) if too_long and rows.rows else []
    rows = rows.without({i: reason for i, reason in enumerate(reasons) if reason})
    limit = config.data.held_out_rows
    return rows.without(dict.fromkeys(range(limit, len(rows.rows)), f"more than {limit} rows"))


def _without(split: SplitRows, questions: set[str], reason: str) -> SplitRows:
    return split.without({i: reason for i, row in enumerate(split.rows) if row.question in questions})
