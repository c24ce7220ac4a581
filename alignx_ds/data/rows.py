"""A row: one prompt, the answer that training imitates, and what a judge needs to know about it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

Record = dict[str, Any]  # a row as its file has it


@dataclass(frozen=True)
class Row:
    """A row without a `response` has no answer to imitate; the router still learns that its prompt is its axis's."""

    prompt: str
    response: str
    harmful: bool = False  # the prompt asks for harm
    correct: tuple[str, ...] = ()  # statements that a truthful answer may make
    incorrect: tuple[str, ...] = ()  # statements that it may not make
    rejected: str = ""  # the worse answer of a preference pair
    category: str = ""  # the data set's own grouping of its questions
    place: str = field(default="", compare=False)  # file and row, for error messages

    @property
    def question(self) -> str:
        """The prompt regardless of case and spacing. Two rows with equal questions are in the same split."""
        return " ".join(self.prompt.casefold().split())

    def content(self) -> dict[str, Any]:
        """Every field but the place: hashes of rows are made of these."""
        return {k: v for k, v in asdict(self).items() if k != "place"}

    def position(self, salt: str) -> float:
        """A hash of the question in [0, 1). Cuts made with different salts are independent of each other."""
        hashed = hashlib.sha256(f"{salt}\n{self.question}".encode()).digest()
        return int.from_bytes(hashed[:8], "big") / 2**64


def split_by_question(rows: list[Row], share: float, salt: str) -> tuple[list[Row], list[Row]]:
    """(rest, cut off): about `share` of the distinct questions go to the second list, with all their rows."""
    return [r for r in rows if r.position(salt) >= share], [r for r in rows if r.position(salt) < share]


def digest(rows: list[Row]) -> str:
    """A hash of the rows' content, in their order."""
    text = json.dumps([row.content() for row in rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
