"""The JSON schema that editors use: the shipped recipes are valid, and what a run refuses by type or bound is not."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import is_dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from jsonschema import Draft7Validator

from alignx_ds import cli
from alignx_ds.config import json_schema, parse, shipped
from alignx_ds.config.bounds import LARGEST_INT, NameIn
from alignx_ds.config.schema import RunConfig
from alignx_ds.mocae.bounds import OneOf, Range
from alignx_ds.plan.checks import TABLES

SCHEMA = json_schema.of_recipes(TABLES)
VALIDATOR = Draft7Validator(SCHEMA)
WORLD = parse.read(shipped.recipes()["world"])
ENTRIES = {"axes": "helpful", "texts": "t", "sets": "s"}  # the entry of each mapping that is tried


def with_(key: str, value: Any) -> dict[str, Any]:
    """The world's recipe with another value of a dotted key."""
    values = copy.deepcopy(WORLD)
    *sections, last = key.split(".")
    node = values
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = value
    return values


def refused(key: str, value: Any) -> bool:
    """Whether the schema refuses this value at this key, and nothing else of the recipe."""
    errors = list(VALIDATOR.iter_errors(with_(key, value)))
    path = "$." + key
    return bool(errors) and all(path.startswith(e.json_path) or e.json_path.startswith(path) for e in errors)


def leaves(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every value of a recipe that stands for itself, not in a list."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        key = f"{prefix}{name}"
        if get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
            hint, key = get_args(hint)[1], f"{key}.{ENTRIES[name]}"
        if is_dataclass(hint):
            yield from leaves(hint, f"{key}.")
        else:
            yield key, hint


def wrong_values(hint: Any) -> list[Any]:
    """Just outside of the type's bounds, and of other types."""
    kind, mark = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
    match mark:
        case Range():
            step = 1 if kind is int else 1e-9
            below = [mark.above] if mark.above is not None else [mark.least - step] if mark.least is not None else []
            above = [mark.below] if mark.below is not None else [mark.most + step] if mark.most is not None else []
            return [*below, *above, inf if kind is float else LARGEST_INT + 1, "many", None, [1]]
        case OneOf() | NameIn():
            return ["nonesuch", 3, None, ["a"]]
    return [2, "maybe", None] if kind is bool else [None, {"stray": []}]


def test_the_schema_is_one_and_every_shipped_recipe_is_valid() -> None:
    Draft7Validator.check_schema(SCHEMA)
    for path in shipped.recipes().values():
        assert [error.message for error in VALIDATOR.iter_errors(parse.read(path))] == [], path


def test_every_default_is_valid() -> None:
    """A run's config.yaml has a value for every key."""
    resolved = parse.to_dict(parse.load("world"))
    assert [error.json_path for error in VALIDATOR.iter_errors(resolved)] == []


def test_every_wrong_value_is_refused() -> None:
    accepted, tried = [], 0
    for key, hint in leaves(RunConfig):
        for value in wrong_values(hint):
            tried += 1
            if not refused(key, value):
                accepted.append((key, value))
    assert not accepted
    assert tried > 400


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sed", 1),
        ("train.learning_rate", 1.0),
        ("axes.helpful.promt", "x"),
        ("axes.a b", {"prompt": "p", "schema": "plain", "train": "world"}),
        ("axes.2nd", {"prompt": "p", "schema": "plain", "train": "world"}),
        ("axes.helpful", {"schema": "plain", "train": "world"}),  # without a prompt
        ("axes.helpful.train", []),
        ("axes.helpful.train", [{"source": "a.json", "weight": -1}]),
        ("axes.helpful.routing", [{"schema": "plain"}]),  # without a source
        ("axes.helpful.columns", {"a.b": "x"}),
        ("model.layers", [-1]),
        ("baselines.make", ["ties", "slerp"]),
        ("model", {}),
    ],
)
def test_wrong_keys_and_entries_are_refused(key: str, value: Any) -> None:
    assert list(VALIDATOR.iter_errors(with_(key, value)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.lr", "${align.lr}"),
        ("train.checkpoint_activations", True),
        ("axes.grüße", {"prompt": "p", "schema": "plain", "train": "world"}),
        ("axes.helpful.train", ["a.json", {"source": "owner/name:train", "weight": 2}]),
        ("axes.helpful.routing", "questions.csv"),
        ("model.template_args", {"enable_thinking": False}),
        ("gate.more", {"nearest": 0.5}),
    ],
)
def test_what_a_run_accepts_is_valid(key: str, value: Any) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(with_(key, value))] == []


def test_a_key_has_the_default_of_its_section_and_the_comments_beside_it() -> None:
    keys = SCHEMA["properties"]
    assert keys["baselines"]["properties"]["h3fusion"]["properties"]["drift"]["default"] == 0.1
    assert keys["train"]["properties"]["warmup_steps"]["default"] == 20
    assert keys["gate"]["properties"]["fractal"]["description"] == "λ₁", "of the class that has the field"
    nonfinite = keys["nonfinite"]
    assert nonfinite["description"] == "at a loss or gradient that is not finite"
    assert nonfinite["anyOf"][0]["enum"] == ["stop", "skip"]
    above = keys["gate"]["properties"]["rows"]["description"]
    assert above.startswith("Per expert, at most") and above.endswith("that a router of needs is.")
    one_source, several = keys["axes"]["additionalProperties"]["properties"]["train"]["anyOf"]
    assert one_source["type"] == "string"
    assert "an entry of the list `train`" in several["items"]["anyOf"][1]["description"]


def test_the_verb_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config-schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(SCHEMA))
    page = Path(__file__).parents[2] / "docs/recipes.md"
    assert "# yaml-language-server: $schema=recipe.schema.json" in page.read_text()
