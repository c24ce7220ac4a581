"""Dialogues as published data sets write them: lists of turns, pairs of a better and a worse answer, HH-RLHF's texts.

A dialogue becomes one row: what comes before its last answer is the prompt, and that answer is the response.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

from alignx_ds.data.columns import checked_text
from alignx_ds.data.rows import Chat, Record, Role, Row, Turn
from alignx_ds.errors import DataError

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai"), "assistant"),
}
TOOLS = frozenset(
    "tool tools function function_call function_response tool_call tool_response observation ipython".split()
)
KEYS = (("role", "content"), ("from", "value"))  # of a turn: OpenAI's and ShareGPT's
SPOKEN = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")  # HH-RLHF's turns
NOT_LEARNED = (0, False)  # a turn's `weight`, as OpenAI's files have it, or its `train`
NO_TOOLS = "uses tools, which are not trained on"


class _UnusableError(Exception):
    """A dialogue that is dropped; the message is the reason."""


def messages(place: str, r: Record) -> Row | str:
    """A record whose column `messages` has the turns."""
    try:
        return _row(place, [*_system(r), *_turns(place, "messages", r["messages"])])
    except _UnusableError as error:
        return str(error)


def labelled(place: str, r: Record) -> Row | str:
    """A dialogue with the names of the axes that it needs."""
    row = messages(place, r | {"system": None})
    if not isinstance(row, Row):
        return row
    category = (r["category"] or "").strip()
    return replace(row, needs=tuple(dict.fromkeys(r["needs"])), harmful=bool(r["harmful"]), category=category)


def sharegpt(place: str, r: Record) -> Row | str:
    try:
        return _row(place, [*_system(r), *_turns(place, "conversations", r["conversations"])])
    except _UnusableError as error:
        return str(error)


def pair(place: str, r: Record) -> Row | str:
    """A record with a chosen and a rejected answer to a prompt, as texts or as lists of turns."""
    try:
        row = _row(place, _answered(place, r, "chosen"))
        if r.get("rejected") is None:
            return row
        worse = _row(place, _answered(place, r, "rejected"))
    except _UnusableError as error:
        return str(error)
    return _compared(row, worse)


def hh_rlhf(place: str, r: Record) -> Row | str:
    try:
        return _compared(_row(place, _spoken(r["chosen"])), _row(place, _spoken(r["rejected"])))
    except _UnusableError as error:
        return str(error)


def question_of(parse: Any) -> Any:
    """A schema's `question`: of the row that `parse` makes of the record, or nothing if it is dropped."""

    def question(record: Record) -> str:
        row = parse("", record)
        return row.question if isinstance(row, Row) else ""

    return question


def _system(r: Record) -> list[Turn]:
    """The system prompt of a column of its own."""
    text = (r.get("system") or "").strip()
    return [Turn("system", text)] if text else []


def _turns(place: str, column: str, given: Any) -> list[Turn]:
    """The turns of a list of messages, or of `datasets`' form of it: a mapping with a list for each key."""
    entries = (
        [given] if isinstance(given, dict) and any(isinstance(given.get(role), str) for role, _ in KEYS) else given
    )
    if isinstance(entries, dict):
        if not all(isinstance(values, list) for values in given.values()) or len(set(map(len, given.values()))) != 1:
            raise DataError(f"{place}: column '{column}' needs a list of turns")
        entries = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
    turns = [_turn(f"{place}: column '{column}', turn {n},", entry) for n, entry in enumerate(entries, start=1)]
    for turn in turns:
        checked_text(place, column, turn.text)
    return turns


def _turn(where: str, entry: Record) -> Turn:
    keys = next((keys for keys in KEYS if isinstance(entry.get(keys[0]), str)), None)
    if keys is None:
        found = ", ".join(map(str, entry)) or "nothing"
        raise DataError(f"{where} needs role and content, or from and value; it has {found}")
    role, content = entry[keys[0]].strip().lower(), entry.get(keys[1])
    if role in TOOLS or entry.get("tool_calls") or entry.get("function_call"):
        raise _UnusableError(NO_TOOLS)
    if role not in ROLES:
        raise _UnusableError(f"has a turn of the unknown role '{role[:20]}'")
    if isinstance(content, list):
        content = _text_of_parts(content)
    if content is not None and not isinstance(content, str):
        raise DataError(f"{where} has {type(content).__name__} as its {keys[1]}; it needs a text")
    learned = not any(entry.get(key) in NOT_LEARNED for key in ("weight", "train"))
    return Turn(ROLES[role], (content or "").strip(), learned or ROLES[role] != "assistant")


def _text_of_parts(parts: list[Any]) -> str:
    """The text of a message in parts."""
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise _UnusableError("has content other than text")
    return "\n".join(text for text in texts if isinstance(text, str))


def _spoken(text: str) -> list[Turn]:
    """The turns of HH-RLHF's texts: "\n\nHuman: …\n\nAssistant: …"."""
    lead, *parts = SPOKEN.split(text.strip())
    if lead.strip() or not parts:
        raise _UnusableError("is no dialogue of Human and Assistant")
    return [Turn(ROLES[who.lower()], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _answered(place: str, r: Record, column: str) -> list[Turn]:
    """The whole dialogue of one of the two answers. A list that holds a question too is whole already."""
    prompt, answer = r.get("prompt"), r[column]
    if isinstance(prompt, str):
        asked = [Turn("user", prompt.strip())]
    else:
        asked = [] if prompt is None else _turns(place, "prompt", prompt)
    if isinstance(answer, str) and prompt is None and SPOKEN.match(answer.strip()):
        return [*_system(r), *_spoken(answer)]  # HH-RLHF's
    if isinstance(answer, str):
        return [*_system(r), *asked, Turn("assistant", answer.strip())]
    turns = _turns(place, column, answer)
    if any(turn.role == "user" for turn in turns):
        asked = [turn for turn in asked if turn.role == "system" and turn not in turns]
    return [*_system(r), *asked, *turns]


def _row(place: str, turns: list[Turn]) -> Row:
    """System turns first, then questions and answers in turn. What follows the last answer to learn is left out."""
    system = list(dict.fromkeys(turn.text for turn in turns if turn.role == "system" and turn.text))
    said = [turn for turn in turns if turn.role != "system"]
    if [turn.role == "system" for turn in turns] != sorted((turn.role == "system" for turn in turns), reverse=True):
        raise _UnusableError("has a system turn after the first turn")
    if not said or said[0].role != "user":
        raise _UnusableError("does not begin with a question" if said else "has no turns")
    if any(a.role == b.role for a, b in pairwise(said)):
        raise _UnusableError("has two turns of one speaker in a row")
    if len(said) > 1 and said[-1].role == "user":
        said = said[:-1]
    if any(not turn.text for turn in said):
        raise _UnusableError("has an empty turn")
    answers = [n for n, turn in enumerate(said) if turn.role == "assistant"]
    if answers and not any(said[n].learned for n in answers):
        raise _UnusableError("has no answer to learn: all have weight 0")
    said = said[: max((n for n in answers if said[n].learned), default=0) + 1]
    answer = said.pop().text if said[-1].role == "assistant" else ""
    before: Chat = (*((Turn("system", "\n\n".join(system)),) if system else ()), *said[:-1])
    return Row(said[-1].text, answer, place=place, before=before)


def _compared(better: Row, worse: Row) -> Row | str:
    """The better answer's row, with the worse one beside it."""
    if better.chat != worse.chat:
        return "chosen and rejected differ before their last answers"
    if not better.response or not worse.response:
        return "empty answer"
    return Row(better.prompt, better.response, rejected=worse.response, place=better.place, before=better.before)
