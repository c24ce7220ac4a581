"""Rows in company: an axis's row joined with other rows into one message, or into a dialogue.

A specialist that has only seen prompts which ask for one thing fails where a prompt asks for two (docs/method.md).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from alignx_ds.config.schema import JoinConfig
from alignx_ds.data.rows import Row, Turn

SEPARATORS = ("\n\n", "\n", " ")
IN_A_DIALOGUE = 1 / 3  # of the joined rows have their company in an earlier turn
TWO_GUESTS = 1 / 4  # of the others are joined with two rows


@dataclass(frozen=True)
class Guest:
    """A row, and the expert that it belongs to."""

    expert: str
    row: Row


class Joiner:
    """Joins rows of one part of the training rows; `rows` are the answered ones by expert, the generalist's too.

    The same arguments give the same rows.
    """

    def __init__(self, rows: dict[str, list[Row]], seed: int) -> None:
        self.seed = seed
        # A dialogue can't be company: its last prompt makes no sense without the turns before.
        self.guests = {
            expert: [Guest(expert, row) for row in own if row.response and not row.before]
            for expert, own in rows.items()
        }
        self.guests = {expert: guests for expert, guests in self.guests.items() if guests}

    def joined(self, axis: str, rows: list[Row], settings: JoinConfig) -> list[Row]:
        """About `settings.share` times as many joined rows as there are `rows` of the axis with an answer."""
        rng = random.Random(f"join {axis} {self.seed}")
        answered = [row for row in rows if row.response]
        count = round(settings.share * len(answered))
        if not count or not self.guests:
            return []
        chosen = [row for _ in range(-(-count // len(answered))) for row in rng.sample(answered, len(answered))]
        return [self._join(Guest(axis, row), settings.answer, rng) for row in chosen[:count]]

    def _guest(self, rng: random.Random) -> Guest:
        """Experts are drawn alike, however many rows they have."""
        return rng.choice(self.guests[rng.choice(list(self.guests))])

    def _join(self, own: Guest, answer: str, rng: random.Random) -> Row:
        if rng.random() < IN_A_DIALOGUE:
            guest = self._guest(rng).row
            earlier = (Turn("user", guest.prompt), Turn("assistant", guest.response, learned=False))
            system = tuple(turn for turn in own.row.before if turn.role == "system")
            rest = own.row.before[len(system) :]
            return replace(own.row, before=(*system, *earlier, *rest), needs=own.row.needs or (own.expert,))
        parts = [own, *(self._guest(rng) for _ in range(1 + (rng.random() < TWO_GUESTS)))]
        rng.shuffle(parts)
        separator = rng.choice(SEPARATORS)
        answered = _answered(parts, own, answer)
        return Row(
            prompt=separator.join(part.row.prompt for part in parts),
            response=separator.join(part.row.response for part in answered),
            harmful=any(part.row.harmful for part in parts),
            category=own.row.category,
            place=own.row.place,
            before=own.row.before,
            needs=_needs(answered),
        )


def _answered(parts: list[Guest], own: Guest, answer: str) -> list[Guest]:
    """The parts whose answers make the answer."""
    if answer == "own":
        return [own]
    harmful = [part for part in parts if part.row.harmful]
    if answer == "refuse" and harmful:
        return [own] if own in harmful else harmful[:1]
    return parts


def _needs(answered: list[Guest]) -> tuple[str, ...]:
    """The experts of the answer's parts. The generalist is needed only where no axis is."""
    needed = dict.fromkeys(name for part in answered for name in (part.row.needs or (part.expert,)))
    return tuple(name for name in needed if name != "generalist" or len(needed) == 1)
