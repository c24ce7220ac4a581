"""Bounds beside the fields: every key of a recipe has one, and every value outside of one is reported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from math import inf, nan
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from alignx_ds.config.bounds import AnyText, NameIn, unfit_texts, violations
from alignx_ds.config.schema import AxisConfig, RunConfig
from alignx_ds.mocae.bounds import NonNegativeInt, OneOf, PositiveFloat, Range
from alignx_ds.plan.checks import TABLES


def fields_of(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every value in a schema; of mappings and lists, the type of their entries."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        while get_origin(hint) in (dict, list):
            hint = get_args(hint)[-1]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from fields_of(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def unbounded(kind: type) -> list[str]:
    """Keys of numbers without a range, and of texts without a choice, a table or an explicit AnyText."""
    suitable = {int: Range, float: Range, str: (OneOf, NameIn, AnyText), Any: AnyText}
    found = []
    for key, hint in fields_of(kind):
        base, mark = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
        if base is not bool and not isinstance(mark, suitable[base]):
            found.append(key)
    return found


def test_every_key_of_a_recipe_has_a_bound() -> None:
    assert unbounded(RunConfig) == []


def test_every_table_that_a_key_names_is_there() -> None:
    marks = [get_args(hint)[1] for _, hint in fields_of(RunConfig) if get_origin(hint) is Annotated]
    assert {mark.table for mark in marks if isinstance(mark, NameIn)} == TABLES.keys()


@dataclass
class Inner:
    rate: PositiveFloat = 1.0
    careless: float = 1.0


@dataclass
class Sample:
    count: NonNegativeInt = 1
    share: Annotated[float, Range(above=0, below=1, fix="try a half")] = 0.5
    few: Annotated[int, Range(least=2, most=3)] = 2
    colour: Annotated[str, OneOf(("red", "blue"))] = "red"
    colours: list[Annotated[str, OneOf(("red", "blue"))]] = field(default_factory=list)
    shape: Annotated[str, NameIn("shapes", optional=True)] = ""
    text: Annotated[str, AnyText()] = ""
    prose: Annotated[str, AnyText(lines=True)] = ""
    weights: dict[str, PositiveFloat] = field(default_factory=dict)
    inner: dict[str, Inner] = field(default_factory=dict)
    forgotten: str = ""
    unsuitable: Annotated[int, AnyText()] = 1
    switch: bool = False


def test_a_key_without_a_bound_is_found() -> None:
    assert unbounded(Sample) == ["inner.careless", "forgotten", "unsuitable"]


@pytest.mark.parametrize(
    ("changes", "reported"),
    [
        ({}, []),
        ({"count": 0, "share": 0.999, "few": 3}, []),
        ({"count": -1}, ["count: got -1, expected at least 0; raise it"]),
        ({"count": 2**31}, ["count: got 2147483648, expected at most 2147483647; lower it"]),
        ({"count": -(10**30)}, [f"count: got {-(10**30)}, expected at least 0; raise it"]),
        ({"share": 0.0}, ["share: got 0.0, expected above 0 and below 1; try a half"]),
        ({"share": 1.0}, ["share: got 1.0, expected above 0 and below 1; try a half"]),
        ({"share": nan}, ["share: got nan, expected a finite number that float32 can hold; correct it"]),
        ({"few": 4}, ["few: got 4, expected at least 2 and at most 3; lower it"]),
        ({"colour": "green"}, ["colour: got 'green', expected one of red, blue; choose one of them"]),
        ({"colours": ["red", "x"]}, ["colours: got 'x', expected one of red, blue; choose one of them"]),
        ({"shape": "round"}, []),
        ({"shape": "flat"}, ["shape: got 'flat', expected one of round, square; choose one of them"]),
        ({"weights": {"a": 1.0, "b": 0.0}}, ["weights.b: got 0.0, expected above 0; raise it"]),
        (
            {"count": -1, "inner": {"x": Inner(rate=inf)}},
            [
                "count: got -1, expected at least 0; raise it",
                "inner.x.rate: got inf, expected a finite number that float32 can hold; correct it",
            ],
        ),
    ],
)  # fmt: skip
def test_every_violation_is_reported_with_its_key_what_is_allowed_and_a_fix(
    changes: dict[str, Any], reported: list[str]
) -> None:
    found = violations(Sample(**changes), {"shapes": ("round", "square")})
    assert [str(problem) for problem in found] == reported


def test_keys_of_a_part_of_the_config_start_with_its_place() -> None:
    assert [p.key for p in violations(Inner(rate=0.0), {}, "a.b.")] == ["a.b.rate"]
    assert [p.key for p in unfit_texts(Sample(text="\a"), "a.")] == ["a.text"]


@pytest.mark.parametrize("text", ["bell\a", "two\nlines", "x" * 256, "/".join(["x" * 200] * 21)])
def test_texts_are_printable_and_short_enough_for_a_path(text: str) -> None:
    assert [p.key for p in unfit_texts(Sample(text=text))] == ["text"]
    assert [p.key for p in unfit_texts(Sample(prose=text))] == (["prose"] if "\a" in text else [])


def test_a_prompt_may_have_lines() -> None:
    axis = AxisConfig(prompt="one\n\ttwo" * 9999, schema="plain", train="world", columns={"prompt": "a\nb"})
    assert [p.key for p in unfit_texts(axis)] == ["columns.prompt"]
