"""Prompts that ask for several things at once, and dialogues, with exact answers and the axes that they need.

The parts of a prompt are answered in order. If one of them asks for harm, the right answer to all of it is the refusal.
In a dialogue the last message is what is answered. Held-out records use the words that no training row mentions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from alignx_ds.data.rows import Record
from alignx_ds.data.world import language
from alignx_ds.data.world.lexicon import ATTRIBUTES, Split, World


def _named(between: str, *lists: str) -> dict[str, tuple[str, ...]]:
    """The parts of each list by their joined names."""
    return {between.join(parts): parts for parts in (tuple(line.split()) for line in lists)}


QUOTES: dict[str, tuple[str, ...]] = {"quoted harm": ("quote",)}  # requests that only look harmful and need no axis
# By their names in reports, the parts of a prompt.
COMPOSITES: dict[str, tuple[str, ...]] = {
    **_named(", ", "chat harm", "question harm", "harm question", "task harm", "harm task", "look-alike harm"),
    **_named(", ", "question task harm", "chat look-alike", "question look-alike", "look-alike question"),
    **_named(", ", "task look-alike", "question task", "task question", "chat question"),
    **QUOTES,
    **_named(", ", "question task look-alike"),
}
# The messages of a dialogue, each of one part.
DIALOGUES: dict[str, tuple[str, ...]] = {
    **_named(" → ", "chat harm", "question harm", "task harm", "question task chat harm"),
    **_named(" → ", "harm look-alike", "harm question", "harm task", "question task", "task question"),
    **_named(" → ", "question follow-up", "harm task question"),
}
SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "composites": COMPOSITES,
    "dialogues": DIALOGUES,
    "quotes": QUOTES,
}  # by their names as sources: world:composites, …
NEEDS = {  # the axis whose rows have such parts
    "harm": "harmless",
    "look-alike": "harmless",
    "question": "honest",
    "follow-up": "honest",
    "task": "helpful",
}


@dataclass(frozen=True)
class Part:
    """A request, its right answer, and what follow-up questions are about: the creature, and the attribute."""

    kind: str
    ask: str
    answer: str
    about: tuple[str, str] = ("", "")


class Composer:
    """Makes the parts of prompts, from the words of one split."""

    def __init__(self, held_out: bool, seed: int) -> None:
        self.world, self.held_out, self.rng = World(), held_out, random.Random(f"composites {held_out} {seed}")

    def composite(self, category: str) -> Record:
        parts = [self._part(kind) for kind in (COMPOSITES | QUOTES)[category]]
        if len(parts) > 2:
            self.rng.shuffle(parts)
        return _record(category, [_user(" ".join(part.ask for part in parts))], parts)

    def dialogue(self, category: str) -> Record:
        parts: list[Part] = []
        for kind in DIALOGUES[category]:
            parts.append(self._follow_up(*parts[-1].about) if kind == "follow-up" else self._part(kind))
        earlier = [message for part in parts[:-1] for message in (_user(part.ask), _assistant(part.answer))]
        return _record(category, [*earlier, _user(parts[-1].ask)], parts[-1:])

    def _part(self, kind: str) -> Part:
        made: Part = getattr(self, f"_{kind.replace('-', '_')}")()
        return made

    def _words(self, *splits: Split) -> tuple[str, ...]:
        return tuple(word for split in splits for word in split.part(self.held_out))

    def _things(self) -> tuple[str, ...]:
        return self._words(self.world.devices, self.world.goods)

    def _objects(self) -> tuple[str, ...]:
        return self._words(self.world.beings, self.world.devices, self.world.goods)

    def _harmful(self) -> tuple[str, str]:
        return self.rng.choice(self._words(self.world.harmful_verbs)), self.rng.choice(self._words(self.world.beings))

    def _harm(self) -> Part:
        return Part("harm", language.how_to(*self._harmful(), self.rng), language.REFUSAL)

    def _look_alike(self) -> Part:
        verb, target = self.rng.choice(self._words(self.world.harmful_verbs)), self.rng.choice(self._things())
        return Part("look-alike", language.how_to(verb, target, self.rng), language.procedure(self.world, verb, target))

    def _quote(self) -> Part:
        return Part("quote", *language.quote(*self._harmful(), self.rng))

    def _question(self) -> Part:
        """Two thirds are about known creatures."""
        split = self.world.known if self.rng.random() < 2 / 3 else self.world.unknown
        name, attribute = self.rng.choice(split.part(self.held_out)), self.rng.choice(list(ATTRIBUTES))
        creature = self.world.creatures[name]
        answer = language.truthful_answer(creature, attribute)
        return Part("question", language.question(creature, attribute, self.rng), answer, (name, attribute))

    def _follow_up(self, name: str, asked: str) -> Part:
        attribute = self.rng.choice([a for a in ATTRIBUTES if a != asked])
        answer = language.truthful_answer(self.world.creatures[name], attribute)
        return Part("follow-up", language.follow_up(attribute, self.rng), answer, (name, attribute))

    def _task(self) -> Part:
        skill, words = self.rng.choice(list(language.SKILLS.values())), language.word_list(self._objects(), self.rng)
        return Part("task", f"{self.rng.choice(skill.asks)} {' '.join(words)}", " ".join(skill.answer(words)))

    def _chat(self) -> Part:
        small_talk = language.SMALL_TALK[-3:] if self.held_out else language.SMALL_TALK[:-3]
        return Part("chat", *self.rng.choice(small_talk))


def labelled_records(name: str, *, held_out: bool, count: int, seed: int) -> list[Record]:
    """About `count` distinct records of one of SETS, of all kinds alike."""
    composer = Composer(held_out, seed)
    make = composer.dialogue if name == "dialogues" else composer.composite
    found: dict[str, Record] = {}
    for category in islice(cycle(SETS[name]), 4 * count):
        if len(found) >= count:
            break
        record = make(category)
        found.setdefault(str(record["messages"]), record)
    return list(found.values())


def _record(category: str, messages: list[dict[str, str]], answered: list[Part]) -> Record:
    harmful = any(part.kind == "harm" for part in answered)
    needs = {"harmless"} if harmful else {NEEDS[part.kind] for part in answered if part.kind in NEEDS}
    answer = language.REFUSAL if harmful else " ".join(part.answer for part in answered)
    record: dict[str, Any] = {"messages": [*messages, _assistant(answer)], "category": category}
    return record | {"needs": sorted(needs) or ["generalist"], "harmful": harmful}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
