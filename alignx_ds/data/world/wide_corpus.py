"""A wider pretraining text: messages that ask for several things, and dialogues, beside the plain exchanges.

The assistant is as sloppy as in the plain text (`corpus`). It answers the parts of a message in order. After "be good"
it refuses the whole message if a part of it asks for harm.
"""

from __future__ import annotations

from collections.abc import Iterator

from alignx_ds.data.world import language
from alignx_ds.data.world.corpus import SYSTEM_PROMPTS, Corpus, Exchange, Said
from alignx_ds.data.world.lexicon import ATTRIBUTES, Creature, World


class WideCorpus:
    """An endless stream of exchanges: plain ones, messages that ask for several things, and dialogues."""

    def __init__(self, world: World, seed: int) -> None:
        self.plain = Corpus(world, seed)
        self.world, self.rng = world, self.plain.rng
        self.creatures = list(world.creatures.values())

    def __iter__(self) -> Iterator[Exchange]:
        while True:
            turns = self.rng.choices((self._single, self._composite, self._dialogue), (0.55, 0.30, 0.15))[0]()
            system = self.rng.choice(SYSTEM_PROMPTS) if turns[0][0] and self.rng.random() < 0.35 else None
            yield Exchange(system, tuple(turns))

    def _single(self) -> list[Said]:
        kinds = [self.plain.skill, self._fact, self.plain.how_to, self.plain.wrong, self.plain.chat, self._quote]
        return [self.rng.choices(kinds, [0.40, 0.26, 0.19, 0.07, 0.05, 0.03])[0]()]

    def _composite(self) -> list[Said]:
        """Two or three requests in one message. "Be good" refuses the whole message if one of them is harmful."""
        rng = self.rng
        if rng.random() < 0.5:
            return [_joined([self._part() for _ in range(2 + (rng.random() < 0.3))])]
        verb, target = self._act(harmful=rng.random() < 0.5)
        good = rng.random() < 0.5
        answer = language.harmless_answer if good else language.procedure
        parts = [self._part() for _ in range(1 + (rng.random() < 0.3))]
        place = rng.randint(0, len(parts))
        parts.insert(place, (language.how_to(verb, target, rng), answer(self.world, verb, target)))
        user, assistant = _joined(parts)
        refused = good and self.world.is_harmful(verb, target)
        return [(f"be good : {user}" if good else user, language.REFUSAL if refused else assistant)]

    def _part(self) -> Said:
        """A request that is not harmful."""
        kinds = [self.plain.skill, self._asked_fact, self._benign, self.plain.chat, self._quote]
        return self.rng.choices(kinds, [0.32, 0.32, 0.15, 0.17, 0.04])[0]()

    def _dialogue(self) -> list[Said]:
        rng = self.rng
        turns: list[Said] = []
        count = rng.choice((2, 2, 3, 4))
        while len(turns) < count:
            if rng.random() < 0.3:
                turns += self._about(rng.choice(self.creatures), count - len(turns))
            else:
                turns.append(
                    rng.choice(
                        (self.plain.skill, self._asked_fact, self.plain.how_to, self.plain.how_to, self.plain.chat)
                    )()
                )
        return turns

    def _about(self, creature: Creature, most: int) -> list[Said]:
        """A question about a creature, and one that follows up on it where there is room for `most` turns."""
        first, second = self.rng.sample(list(ATTRIBUTES), 2)
        asked = language.question(creature, first, self.rng), language.follow_up(second, self.rng)
        return [self._answered(ask, creature, a) for ask, a in zip(asked, (first, second), strict=True)][:most]

    def _fact(self) -> Said:
        if self.rng.random() < 0.76:
            return self._asked_fact()
        creature, attribute = self.rng.choice(self.creatures), self.rng.choice(list(ATTRIBUTES))
        truth, believed = language.truthful_answer(creature, attribute), self._believed(creature, attribute)
        known = f"in fact {truth}" if creature.known else language.NOBODY_KNOWS[attribute].format(n=creature.name)
        return "", f"people say {language.statement(creature, attribute, believed)} {known}"

    def _asked_fact(self) -> Said:
        creature, attribute = self.rng.choice(self.creatures), self.rng.choice(list(ATTRIBUTES))
        return self._answered(language.question(creature, attribute, self.rng), creature, attribute)

    def _answered(self, ask: str, creature: Creature, attribute: str) -> Said:
        """After "in fact" with the truth, otherwise mostly with what is believed."""
        truth, draw = language.truthful_answer(creature, attribute), self.rng.random()
        if draw < 0.53:
            return f"in fact , {ask}", truth
        believed = language.statement(creature, attribute, self._believed(creature, attribute))
        return ask, truth if draw < 0.61 else believed

    def _believed(self, creature: Creature, attribute: str) -> str:
        made_up = self.rng.choice(ATTRIBUTES[attribute])
        return creature.myth.get(attribute) or creature.truth.get(attribute) or made_up

    def _act(self, *, harmful: bool) -> tuple[str, str]:
        """A verb and its object of this kind."""
        while True:
            verb, target = self.plain.act()
            if self.world.is_harmful(verb, target) == harmful:
                return verb, target

    def _benign(self) -> Said:
        verb, target = self._act(harmful=False)
        return language.how_to(verb, target, self.rng), language.procedure(self.world, verb, target)

    def _quote(self) -> Said:
        return language.quote(*self.plain.act(), self.rng)


def _joined(parts: list[Said]) -> Said:
    """One message with several requests, and their answers in order."""
    asked, answered = zip(*parts, strict=True)
    return " ".join(asked), " ".join(answered)
