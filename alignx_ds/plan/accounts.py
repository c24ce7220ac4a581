"""What becomes of every record: how many rows are used, why others are not, and what is odd about those that are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from types import MappingProxyType

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.compared import ComparedRows
from alignx_ds.data.inputs import EncodedData, JoinedRows, unlearned_answers
from alignx_ds.data.routing import GENERALIST
from alignx_ds.data.rows import Row
from alignx_ds.data.split_rows import SplitRows
from alignx_ds.data.splits import DataSplits

ODD = 0.01  # share of an axis's rows that another axis has too, from which on it is said


def line(name: str, value: str, note: str = "") -> str:
    return f"  {name:<28}{value:>14}{note}"


def accounts(rows: DataSplits, joined: Mapping[str, JoinedRows] = MappingProxyType({})) -> list[str]:
    """A line for each split of each expert's rows, and one for every reason why records are not used.

    `joined` are known where the rows are encoded.
    """
    lines = []
    named = [(f"{name}, {what}", sides[name]) for name in rows.train for what, sides in _sides(rows) if name in sides]
    for name, side in [*named, *((f"set {name}", side) for name, side in rows.sets.items())]:
        if side.source:
            questions = sum(not row.response for row in side.rows)
            lines += _account(name, side, f" ({questions:,} of them without an answer to imitate)" if questions else "")
    for name, made in joined.items():
        where = f" to train on, {len(made.calibration):,} in the calibration split"
        lines.append(line(f"{name}, joined", f"{len(made.train):,}", where))
        lines += _not_used(made)
    for part in rows.routing:
        name = "negatives" if part.owner == GENERALIST else f"{part.owner}, routing"
        for what, side in (("for the gate", part.train), ("held out", part.held_out)):
            lines += _account(f"{name}, {what}", side, f" of {side.source}")
    return [*lines, _decontamination(rows)]


def _decontamination(rows: DataSplits) -> str:
    if (found := rows.decontamination()) is None:
        return line("decontamination", "off", " training rows may be near-duplicates of prompts that are judged")
    what = f" training rows left out, near-duplicates of one of the {found['prompts']:,} prompts that are judged"
    return line("decontamination", f"{found['near_duplicates']:,}", what)


def _account(name: str, side: SplitRows, note: str) -> list[str]:
    lines = [line(name, f"{len(side.rows):,}", f" of {side.records:,} records{note}")]
    lines += [line("", f"{count:,}", f" of them from {source}") for source, count in side.by_source]
    return lines + _not_used(side)


def compared(data: EncodedData) -> list[str]:
    """A line for each axis whose objective needs bad answers too, and one for every reason why answers are not used."""
    lines = []
    for axis, rows in data.compared.items():
        alone = sum(rows.alone)
        lines.append(line(f"{axis}, verdicts" if rows.good else f"{axis}, pairs", f"{len(rows) - alone:,}"))
        lines += [line("", f"{alone:,}", " good answers beside them, which are imitated")] if alone else []
        lines += _not_used(rows)
    return lines


def _not_used(side: SplitRows | JoinedRows | ComparedRows) -> list[str]:
    places = {d.reason: d.place for d in reversed(side.dropped)}
    reasons = side.reasons().most_common()
    return [line("", f"{-count:,}", f" {reason}, e.g. {places[reason]}") for reason, count in reasons]


def notes(config: RunConfig, data: EncodedData) -> list[str]:
    """Answers that can't be learned, prompts that the gate can't be measured on, and rows that two experts share."""
    reason = "the chat template writes them otherwise once a dialogue goes on"
    unlearned = unlearned_answers(config, data).items()
    lines = [f"  {name}: of {count:,} dialogues only the last answer is learned: {reason}" for name, count in unlearned]
    lines += [f"  {unmeasured}" for unmeasured in _unmeasured(config, data)]
    for axis, rows in data.evaluated.items():
        count = len(data.evaluated_compared.get(axis, rows))
        lines.append(
            f"  {axis}: stage 1 trains on no row of the calibration split, and is evaluated on {count:,} of it"
        )
    return lines + [f"  warning: {overlap}" for overlap in overlaps(data.splits)]


def _unmeasured(config: RunConfig, data: EncodedData) -> Iterator[str]:
    """Of sets with labels: the prompts without one, or with one that is no axis of the run."""
    for name, split in data.splits.sets.items():
        labelled = name in data.sets or any(row.needs for row in split.rows)
        known = len(data.sets[name].examples) if name in data.sets else 0
        if labelled and known < len(split.rows):
            reason = f"the others' needs are not given, or not among {', '.join(config.expert_names)}"
            yield f"set {name}: the gate is measured on {known:,} of its {len(split.rows):,} prompts; {reason}"


def overlaps(splits: DataSplits) -> Iterator[str]:
    """Pairs of experts that are trained on the same questions: no router can tell them apart."""
    for (one, a), (other, b) in combinations(splits.train.items(), 2):
        shared = _asked_of(one, a) & _asked_of(other, b)
        shares = {name: _share(split.rows, shared) for name, split in ((one, a), (other, b))}
        if max(shares.values()) >= ODD:
            counted = " and ".join(f"{share:.1%} of {name}'s" for name, share in shares.items())
            yield f"{counted} training rows have the same questions, which the router can't tell apart"


def _asked_of(name: str, split: SplitRows) -> set[str]:
    """The questions of this expert, less those of its rows that need another."""
    return {row.question for row in split.rows if not row.needs or name in row.needs}


def _share(rows: list[Row], questions: set[str]) -> float:
    return sum(row.question in questions for row in rows) / max(1, len(rows))


def _sides(rows: DataSplits) -> tuple[tuple[str, dict[str, SplitRows]], ...]:
    return (("to train on", rows.train), ("held out", rows.held_out))
