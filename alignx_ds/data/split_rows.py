"""The rows of one split: of one source or of several, less those that are not used, each with the reason."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from alignx_ds.data.columns import Records
from alignx_ds.data.parsers import Parsed
from alignx_ds.data.rows import Dropped, Row
from alignx_ds.errors import DataError

Use = Literal["train", "held out", "set", "routing"]
# Of rows of an expert or a set, and their use: why each is too long, or nothing.
TooLong = Callable[[Use, str, list[Row]], list[str]]
CHUNK = 1000  # rows that are encoded at a time, until there are as many as a limit allows
HELD_OUT = "held out"  # the salt of the hash that cuts a source into training and held-out rows
REFUSAL = "refusal"  # that of the hash that chooses a refusal


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
            rows.append(replace(row, source=number))
            counts[number] += 1
    names = [part.source for part in parts]
    records = sum(part.records for part in parts)
    return SplitRows(", ".join(names), records, rows, dropped, tuple(zip(names, counts, strict=True)))


def of_wrong_kind(row: Row, only: str) -> str:
    """Why a row is not one of those that are wanted, `only` the "safe" or the "unsafe" ones; nothing if it is."""
    return f"its prompt is {'unsafe' if row.harmful else 'safe'}" if only and row.harmful != (only == "unsafe") else ""


def refusing(split: SplitRows, refusals: Sequence[str]) -> SplitRows:
    """The split with a refusal, chosen by the hash of the question, as the answer to harmful prompts that have none."""
    if not refusals:
        return split

    def answered(row: Row) -> Row:
        if row.response or not row.harmful:
            return row
        return replace(row, response=refusals[int(row.position(REFUSAL) * len(refusals))].strip())

    return replace(split, rows=[answered(row) for row in split.rows])


def needing(split: SplitRows, needs: Sequence[str]) -> SplitRows:
    """The split with these experts as those that its prompts need; what asks for harm keeps needing its axis."""
    if not needs:
        return split
    rows = [row if row.harmful or row.needs else replace(row, needs=tuple(needs)) for row in split.rows]
    return replace(split, rows=rows)


def leaked(split: SplitRows, judged: frozenset[str]) -> dict[int, str]:
    """The rows with a question that is held out, also as an earlier turn."""
    rows = enumerate(split.rows)
    return {i: "its question is held out" for i, row in rows if not judged.isdisjoint(row.questions)}


def used(
    parts: Sequence[SplitRows],
    limit: int,
    use: Use,
    name: str,
    too_long: TooLong | None,
    weights: Sequence[float] = (),
) -> SplitRows:
    """The first rows of an expert's sources that are not too long. Raises DataError for a source without any."""
    fitting = [first_rows(part, limit, use, name, too_long) for part in parts]
    if len(fitting) < 2:
        return fitting[0] if fitting else SplitRows("", 0, [], [])
    return mixed(fitting, weights if any(weights) else [len(part.rows) for part in parts], limit, exact=any(weights))


def first_rows(split: SplitRows, limit: int, use: Use, name: str, too_long: TooLong | None) -> SplitRows:
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
    what = {"train": " to train on", "held out": " held out", "set": "", "routing": " to route"}[use]
    raise DataError(f"{where}: no usable row{what}{_why_empty(left)}")


def _why_empty(split: SplitRows) -> str:
    counts = ", ".join(f"{count} × {reason}" for reason, count in split.reasons().most_common())
    why = f" of {split.records} records ({counts})" if counts else ": the source is empty"
    return f"{why}; give a source with usable rows"
