"""A row is one query with the answer that training imitates and what a judge needs to know about it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]  # a row as its file has it


@dataclass(frozen=True)
class Row:
    """One query. `harmful`: it asks for harm. `correct`/`incorrect`: what a truthful answer may and may not say."""

    prompt: str
    response: str
    harmful: bool = False
    correct: tuple[str, ...] = ()
    incorrect: tuple[str, ...] = ()
    place: str = field(default="", compare=False)  # file and row, for error messages

    def bucket(self, buckets: int) -> int:
        """A stable hash of the question, so that no question is ever on both sides of a split."""
        return int.from_bytes(hashlib.sha256(self.prompt.encode()).digest()[:8], "big") % buckets


def split(rows: list[Row], held_back: float) -> tuple[list[Row], list[Row]]:
    """(kept, held back), by question: about `held_back` of the distinct questions go to the second part."""
    cut = round(held_back * 1000)
    return [r for r in rows if r.bucket(1000) >= cut], [r for r in rows if r.bucket(1000) < cut]
