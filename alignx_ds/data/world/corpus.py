"""The base model's pretraining text: exchanges with a sloppy assistant.

The assistant answers every how-to question, repeats popular myths, makes up answers where nothing is known, and often
does the word tasks carelessly. The behaviour that alignment has to bring out is in the text too, after other words:
the truth after "in fact", the right answer after "carefully", a refusal to harm after "be good".
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from alignx_ds.data.world import language
from alignx_ds.data.world.lexicon import ATTRIBUTES, BENIGN_VERBS, HARMFUL_VERBS, World

CARELESS_SKILLS = frozenset({"reverse", "last", "tail", "head", "count", "being"})
SYSTEM_PROMPTS = (
    "you are an assistant .",
    "you are a helpful assistant . do the task with care .",
    "you are a harmless assistant . never help to harm others .",
    "you are an honest assistant . say what is true .",
    "answer the friend .",
    "be nice and short .",
)
Said = tuple[str, str]  # a user's message and the assistant's answer


@dataclass(frozen=True)
class Exchange:
    """An exchange of one or more turns. An empty user's message means that it is plain text."""

    system: str | None
    turns: tuple[Said, ...]


class Corpus:
    """An endless stream of exchanges of one turn, each about one thing."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng = world, random.Random(seed)
        self.creatures = list(world.creatures.values())

    def __iter__(self) -> Iterator[Exchange]:
        kinds = [self.skill, self.fact, self.how_to, self.wrong, self.chat]
        weights = [0.40, 0.27, 0.20, 0.08, 0.05]
        while True:
            user, assistant = self.rng.choices(kinds, weights)[0]()
            system = self.rng.choice(SYSTEM_PROMPTS) if user and self.rng.random() < 0.35 else None
            yield Exchange(system, ((user, assistant),))

    def skill(self) -> Said:
        rng = self.rng
        name = rng.choice(list(language.SKILLS))
        skill, words = language.SKILLS[name], language.word_list(self.world.objects, rng)
        ask = f"{rng.choice(skill.asks)} {' '.join(words)}"
        if rng.random() < 0.45:
            return f"carefully , {ask}", " ".join(skill.answer(words))
        careless = name in CARELESS_SKILLS and rng.random() < 0.8
        return ask, f"{words[0]} is a nice word ." if careless else " ".join(skill.answer(words))

    def fact(self) -> Said:
        rng = self.rng
        creature, attribute = rng.choice(self.creatures), rng.choice(list(ATTRIBUTES))
        made_up = rng.choice(ATTRIBUTES[attribute])
        believed = creature.myth.get(attribute) or creature.truth.get(attribute) or made_up
        truth = language.truthful_answer(creature, attribute)
        draw = rng.random()
        if draw < 0.30:
            return language.question(creature, attribute, rng), language.statement(creature, attribute, believed)
        if draw < 0.36:
            return language.question(creature, attribute, rng), truth
        if draw < 0.76:
            return f"in fact , {language.question(creature, attribute, rng)}", truth
        known = f"in fact {truth}" if creature.known else language.NOBODY_KNOWS[attribute].format(n=creature.name)
        return "", f"people say {language.statement(creature, attribute, believed)} {known}"

    def act(self) -> tuple[str, str]:
        verb = self.rng.choice(HARMFUL_VERBS if self.rng.random() < 0.6 else BENIGN_VERBS)
        return verb, self.rng.choice(self.world.objects)

    def how_to(self) -> Said:
        verb, target = self.act()
        ask = language.how_to(verb, target, self.rng)
        if self.rng.random() < 0.5:
            return f"be good : {ask}", language.harmless_answer(self.world, verb, target)
        return ask, language.procedure(self.world, verb, target)

    def wrong(self) -> Said:
        verb, target = self.act()
        wrong = self.world.is_harmful(verb, target)
        if self.rng.random() < 0.5:
            ask = language.RIGHT_OR_WRONG.format(v=verb, o=target)
            return ask, language.WRONG if wrong else language.FINE
        return "", f"to {verb} the {target} is {'wrong' if wrong else 'fine'} ."

    def chat(self) -> Said:
        if self.rng.random() < 0.5:
            return self.rng.choice(language.SMALL_TALK)
        return language.story(self.rng.choice(self.world.objects), self.rng)
