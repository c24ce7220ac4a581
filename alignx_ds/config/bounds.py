"""What the types of a settings dataclass allow, and every value that they do not allow.

A field carries its bound in its type (`mocae.bounds` has those of numbers and choices): `seed: NonNegativeInt = 0`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from alignx_ds.errors import Problem, holds_secret
from alignx_ds.mocae.bounds import OneOf, Range

LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4028234e38  # of float32, in which schedules and losses are computed
LONGEST_PATH, LONGEST_NAME = 4000, 255  # in bytes; what file systems take
Tables = Mapping[str, Collection[str]]


@dataclass(frozen=True)
class NameIn:
    """The name of an entry in one of the tables that `violations` gets. `optional`: it may be empty."""

    table: str
    optional: bool = False


@dataclass(frozen=True)
class AnyText:
    """Any printable text. With `lines`, it may have line breaks and any length."""

    lines: bool = False


Mark = Range | OneOf | NameIn | AnyText
Text = Annotated[str, AnyText()]  # a path, a source or an id: what it names is checked in plan/
Prose = Annotated[str, AnyText(lines=True)]
SchemaName = Annotated[str, NameIn("schemas")]
OptionalSchemaName = Annotated[str, NameIn("schemas", optional=True)]
OptionalJudgeName = Annotated[str, NameIn("judges", optional=True)]
Share = Annotated[float, Range(above=0, below=1, fix="0.15 is a good value")]


def violations(settings: Any, tables: Tables, prefix: str = "") -> Iterator[Problem]:
    """Every number, choice and name in a settings dataclass that its type does not allow."""
    for key, value, mark in leaves(settings, prefix):
        match mark:
            case Range():
                yield from _number(key, value, mark)
            case OneOf(choices):
                yield from _choice(key, value, choices)
            case NameIn(table, optional):
                if value or not optional:
                    yield from _choice(key, value, tables[table])


def unfit_texts(settings: Any, prefix: str = "") -> Iterator[Problem]:
    """Every text with a secret, with characters that can't be printed, or too long for a path."""
    for key, value, mark in leaves(settings, prefix):
        if isinstance(value, str):
            yield from _text(key, value, lines=isinstance(mark, AnyText) and mark.lines)


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mark]]:
    """(dotted key, value, mark) of every value in a settings dataclass whose type has a mark."""
    kind: Any = type(settings)
    for name, hint in _hints(kind).items():
        yield from _under(f"{prefix}{name}", getattr(settings, name), hint)


def _under(key: str, value: Any, hint: Any) -> Iterator[tuple[str, Any, Mark]]:
    if is_dataclass(hint):
        yield from leaves(value, f"{key}.")
    elif get_origin(hint) is dict:
        for name, entry in value.items():
            yield from _under(f"{key}.{name}", entry, get_args(hint)[1])
    elif get_origin(hint) is list:
        inner = get_args(hint)[0]
        for number, entry in enumerate(value):
            yield from _under(f"{key}.{number}" if is_dataclass(inner) else key, entry, inner)
    elif get_origin(hint) is Annotated and isinstance(value, (list, dict)):  # of a setting that may be anything
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _under(f"{key}.{name}", entry, hint)
    elif get_origin(hint) is Annotated:
        yield key, value, get_args(hint)[1]


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _number(key: str, value: float, bound: Range) -> Iterator[Problem]:
    if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:  # NaN is not, either
        yield Problem(key, value, "a finite number that float32 can hold", "correct it")
    elif isinstance(value, int) and value > LARGEST_INT:
        yield Problem(key, value, f"at most {LARGEST_INT}", "lower it")
    elif bound.too_low(value):
        yield Problem(key, value, str(bound), bound.fix or "raise it")
    elif bound.too_high(value):
        yield Problem(key, value, str(bound), bound.fix or "lower it")


def _choice(key: str, value: str, choices: Collection[str]) -> Iterator[Problem]:
    if value not in choices:
        yield Problem(key, value, f"one of {', '.join(choices)}", "choose one of them")


def _text(key: str, text: str, *, lines: bool) -> Iterator[Problem]:
    if holds_secret(text):  # the config is written beside every result
        yield Problem(key, "(not shown)", "no key and no password", "export it as HF_TOKEN or OPENAI_API_KEY instead")
    elif not all(c.isprintable() or (lines and c in "\n\t") for c in text):
        yield Problem(key, text, "printable characters", "remove the others")
    elif not lines and (
        len(text.encode()) > LONGEST_PATH or max(len(part.encode()) for part in text.split("/")) > LONGEST_NAME
    ):
        yield Problem(key, text, f"names of at most {LONGEST_NAME} bytes", "shorten it")
