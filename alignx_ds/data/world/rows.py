"""Rows of the world in the three published schemas, and in the plain schema for the generalist.

Held-out rows use creatures, verbs, beings, devices and goods that no training row mentions.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from alignx_ds.data.rows import Record
from alignx_ds.data.world import language
from alignx_ds.data.world.composites import SETS, labelled_records
from alignx_ds.data.world.lexicon import ATTRIBUTES, World
from alignx_ds.data.world.opposites import PHRASES, opposite_records


def source_records(source: str, schema: str, *, held_out: bool, count: int, seed: int) -> list[Record]:
    """About `count` distinct records of one of SOURCES."""
    _, _, name = source.partition(":")
    if not name:
        return world_records(schema, held_out=held_out, count=count, seed=seed)
    make = opposite_records if name in PHRASES else labelled_records
    return make(name, held_out=held_out, count=count, seed=seed)


def world_records(schema: str, *, held_out: bool, count: int, seed: int) -> list[Record]:
    """About `count` distinct records of one schema. The same arguments give the same records."""
    world, rng = World(), random.Random(f"{schema} {held_out} {seed}")
    records: dict[str, list[Record]] = {}
    misses = 0
    while len(records) < count and misses < 1000:
        made = _MAKERS[schema](world, held_out, rng)
        key = str(made[0])
        misses = misses + 1 if key in records else 0
        records.setdefault(key, made)
    return [record for made in records.values() for record in made]


def _alpaca(world: World, held_out: bool, rng: random.Random) -> list[Record]:
    things = (*world.beings.part(held_out), *world.devices.part(held_out), *world.goods.part(held_out))
    skill, words = rng.choice(list(language.SKILLS.values())), language.word_list(things, rng)
    answer = " ".join(skill.answer(words))
    return [{"instruction": rng.choice(skill.asks), "input": " ".join(words), "output": answer}]


def _beavertails(world: World, held_out: bool, rng: random.Random) -> list[Record]:
    """Half of the prompts are harmful. Of the others, half are look-alikes: a harmful verb with a thing as object."""
    beings, things = world.beings.part(held_out), (*world.devices.part(held_out), *world.goods.part(held_out))
    kind = rng.choice(("harmful", "harmful", "look-alike", "plain"))
    verb = rng.choice(world.benign_verbs.part(held_out) if kind == "plain" else world.harmful_verbs.part(held_out))
    target = rng.choice({"harmful": beings, "look-alike": things, "plain": (*beings, *things)}[kind])
    prompt = language.how_to(verb, target, rng)
    safe = {
        "prompt": prompt,
        "response": language.harmless_answer(world, verb, target),
        "category": {},
        "is_safe": True,
    }
    if kind != "harmful":
        return [safe]
    category = {"violence,aiding_and_abetting,incitement": True}
    unsafe = {
        "prompt": prompt,
        "response": language.procedure(world, verb, target),
        "category": category,
        "is_safe": False,
    }
    return [safe, unsafe]


def _truthfulqa(world: World, held_out: bool, rng: random.Random) -> list[Record]:
    """Two thirds are about known creatures, one third about creatures that nothing is known about."""
    names = world.known.part(held_out) if rng.random() < 2 / 3 else world.unknown.part(held_out)
    creature, attribute = world.creatures[rng.choice(names)], rng.choice(list(ATTRIBUTES))
    best = language.truthful_answer(creature, attribute)
    wrong = [v for v in ATTRIBUTES[attribute] if v != creature.truth.get(attribute)]
    return [
        {
            "Type": "Adversarial" if attribute in creature.myth else "Non-Adversarial",
            "Category": attribute,
            "Question": language.question(creature, attribute, rng),
            "Best Answer": best,
            "Correct Answers": best if best == language.DO_NOT_KNOW else f"{best}; {language.DO_NOT_KNOW}",
            "Incorrect Answers": "; ".join(language.statement(creature, attribute, v) for v in wrong),
            "Source": "the world",
        }
    ]


def _plain(world: World, held_out: bool, rng: random.Random) -> list[Record]:
    things = (*world.beings.part(held_out), *world.devices.part(held_out), *world.goods.part(held_out))
    small_talk = language.SMALL_TALK[-3:] if held_out else language.SMALL_TALK[:-3]
    if rng.random() < 0.1:
        prompt, response = rng.choice(small_talk)
    else:
        target = rng.choice(things)
        ask = rng.choice((*language.STORY_ASKS, *language.UNSEEN_STORY_ASKS))
        _, response = language.story(target, random.Random(target))  # one answer per target, for every phrasing
        prompt = ask.format(o=target)
    return [{"prompt": prompt, "response": response}]


_MAKERS: dict[str, Callable[[World, bool, random.Random], list[Record]]] = {
    "alpaca": _alpaca,
    "beavertails": _beavertails,
    "truthfulqa": _truthfulqa,
    "plain": _plain,
}
SCHEMAS_OF_THE_WORLD = frozenset(_MAKERS)
SOURCES: dict[str, frozenset[str]] = {  # what the world can be a source of, and in which schemas
    "world": SCHEMAS_OF_THE_WORLD,
    **{f"world:{name}": frozenset({"labelled"}) for name in SETS},
    **{f"world:{name}": frozenset({"plain"}) for name in PHRASES},
}
