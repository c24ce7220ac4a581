"""A row: one prompt, the answer that training imitates, and what a judge needs to know about it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Record = dict[str, Any]  # a row as its file has it
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """What one speaker says in a dialogue; an answer that is not `learned` is read like a question."""

    role: Role
    text: str
    learned: bool = True


Chat = tuple[Turn, ...]  # the turns of a dialogue, in order
NEXT_TURN = "\0"  # between the turns of a question
SPEAKERS: dict[Role, str] = {"user": "User", "assistant": "Assistant"}


@dataclass(frozen=True)
class Row:
    """A row without a `response` has no answer to imitate; the router still learns that its prompt is its axis's.

    Of a dialogue, `prompt` is the last user turn, `response` the answer to it, and `before` the turns before the two.
    """

    prompt: str
    response: str
    harmful: bool = False  # the prompt asks for harm
    correct: tuple[str, ...] = ()  # statements that a truthful answer may make
    incorrect: tuple[str, ...] = ()  # statements that it may not make, or unsafe answers
    rejected: str = ""  # the worse answer of a preference pair
    category: str = ""  # the data set's own grouping of its questions
    place: str = field(default="", compare=False)  # file and row, for error messages
    before: Chat = ()  # earlier turns of a dialogue, and a system prompt of the row's own
    source: int = field(default=0, compare=False)  # its number among the sources of its expert
    needs: tuple[str, ...] = ()  # the experts whose work the prompt asks for; empty: the one of its source

    @property
    def worse(self) -> tuple[str, ...]:
        """Answers to the prompt that are worse than the response."""
        return (self.rejected,) if self.rejected else self.incorrect

    @property
    def chat(self) -> Chat:
        """All turns that the answer follows: what the router and the model see."""
        return (*self.before, Turn("user", self.prompt))

    @property
    def question(self) -> str:
        """The user's turns regardless of case and spacing. Two rows with equal questions are in the same split."""
        return NEXT_TURN.join(self._user_turns())

    @property
    def questions(self) -> frozenset[str]:
        """All questions that the row's answers answer: the dialogue up to each of them, and each turn by itself."""
        turns = self._user_turns()
        return frozenset((*turns, *(NEXT_TURN.join(turns[: n + 1]) for n in range(len(turns)))))

    def _user_turns(self) -> list[str]:
        return [" ".join(turn.text.casefold().split()) for turn in self.chat if turn.role == "user"]

    @property
    def asked(self) -> str:
        """The prompt as one text, for judges and classifiers; of a dialogue, all turns, each after its speaker."""
        if not any(turn.role != "system" for turn in self.before):
            return self.prompt
        return "\n\n".join(f"{SPEAKERS[turn.role]}: {turn.text}" for turn in self.chat if turn.role in SPEAKERS)

    def content(self) -> dict[str, Any]:
        """What the row says, with no `before` or `needs` that is empty; not where it is from. Hashes are made of it."""
        given = {k: v for k, v in asdict(self).items() if k not in ("place", "source")}
        return {k: v for k, v in given.items() if k not in ("before", "needs") or v}

    @classmethod
    def from_content(cls, content: dict[str, Any], place: str = "") -> Row:
        """The row of a `content` that was written as JSON. Raises TypeError for other content."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        before = tuple(Turn(**turn) for turn in known.pop("before", ()))
        return cls(**known, place=place, before=before)

    def position(self, salt: str) -> float:
        """A hash of the question in [0, 1). Cuts made with different salts are independent of each other."""
        hashed = hashlib.sha256(f"{salt}\n{self.question}".encode()).digest()
        return int.from_bytes(hashed[:8], "big") / 2**64


@dataclass(frozen=True)
class Dropped:
    """A record that is not used, and why."""

    place: str
    reason: str


def split_by_question(rows: list[Row], share: float, salt: str) -> tuple[list[Row], list[Row]]:
    """(rest, cut off): about `share` of the distinct questions go to the second list, with all their rows."""
    return [r for r in rows if r.position(salt) >= share], [r for r in rows if r.position(salt) < share]


def digest(rows: list[Row]) -> str:
    """A hash of the rows' content, in their order."""
    text = json.dumps([row.content() for row in rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
