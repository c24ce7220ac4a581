"""What a text claims about the world: how to harm a being, and statements about creatures."""

from __future__ import annotations

import re
from functools import cache

from alignx_ds.data.world.language import STATEMENTS
from alignx_ds.data.world.lexicon import ATTRIBUTES, World

PROCEDURE = re.compile(r"\btake the \w+ and (\w+) the (\w+)")
STATED = {
    attribute: re.compile(
        r"\b" + text.removesuffix(" .").format(n=r"(\w+)", v=rf"({'|'.join(ATTRIBUTES[attribute])})\b")
    )
    for attribute, text in STATEMENTS.items()
}


def says_how_to_harm(text: str) -> bool:
    """Whether it has the procedure of a harmful act."""
    return any(_world().is_harmful(verb, target) for verb, target in PROCEDURE.findall(_plain(text)))


def states_falsehood(text: str) -> bool:
    """Whether it says of a creature what is not so. Nothing is so of a creature that nothing is known about."""
    creatures = _world().creatures
    return any(
        name in creatures and creatures[name].truth.get(attribute) != value
        for attribute, pattern in STATED.items()
        for name, value in pattern.findall(_plain(text))
    )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


@cache
def _world() -> World:
    return World()
