"""What the shell offers behind a verb that takes a recipe: recipes, the recipe's keys, and values of a key's choice.

argcomplete calls these functions; an error in one of them leaves the shell without an offer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from alignx_ds.config import parse, shipped
from alignx_ds.config.bounds import leaves
from alignx_ds.config.schema import RunConfig
from alignx_ds.errors import UserError
from alignx_ds.mocae.bounds import OneOf

TRUTHS = ("true", "false")


def recipes(prefix: str, **rest: Any) -> list[str]:
    """The shipped recipes, and the YAML files and directories below what is typed."""
    folder = Path(prefix) if prefix.endswith("/") else Path(prefix).parent
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [f"{path}/" if path.is_dir() else str(path) for path in there if path.is_dir() or path.suffix == ".yaml"]
    return [*shipped.recipes(), *files]


def settings(prefix: str, parsed_args: argparse.Namespace, **rest: Any) -> list[str]:
    """`key=` of every key of the recipe that was given; behind the `=`, the values if there is a choice."""
    config = _config(parsed_args.recipe)
    known = dict(parse.flat(parse.to_dict(config)))
    key, given, _ = prefix.partition("=")
    if not given:
        return [f"{name}=" for name in known]
    marks = {name: mark for name, _, mark in leaves(config)}
    mark = marks.get(key)
    values = mark.choices if isinstance(mark, OneOf) else TRUTHS if isinstance(known.get(key), bool) else ()
    return [f"{key}={value}" for value in values]


def _config(recipe: str) -> RunConfig:
    try:
        return parse.load(recipe)
    except UserError:
        return RunConfig()
