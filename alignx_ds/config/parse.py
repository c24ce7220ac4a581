"""From a recipe file and `key=value` overrides to a typed `RunConfig`.

`load` reports every problem at once, before any process group starts.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignx_ds.config import shipped
from alignx_ds.config.bounds import unfit_texts
from alignx_ds.config.choices import COSINE_TO_TENTH
from alignx_ds.config.schema import SPREAD, OptimizerConfig, RunConfig, SourceConfig
from alignx_ds.errors import ConfigError, Problem

# Errors of reading YAML. ValueError: bytes that are not UTF-8, and numbers of thousands of digits.
UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError)
QUOTED_NOTHING = "''"  # what `key=` stands for
LONGEST_NAME = 64  # of an axis or a set: it becomes a file name


def read(path: Path) -> dict[str, Any]:
    """The values of a recipe file. Raises ConfigError."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except UNREADABLE as error:
        raise ConfigError(Problem("recipe", str(path), "valid YAML", _reason(error))) from error
    if not isinstance(values, dict):
        raise ConfigError(Problem("recipe", str(path), "a YAML mapping", "write it as `key: value` lines"))
    return {str(key): value for key, value in values.items()}


def _reason(error: BaseException) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())


def override(values: dict[str, Any], given: str, problems: list[Problem]) -> None:
    """Set one `key=value` in the recipe's values."""
    key, equals, text = given.partition("=")
    if not equals or not all(key.split(".")):
        problems.append(Problem("command line", given, "key=value", "write it as train.lr=1e-3"))
        return
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text or QUOTED_NOTHING}"]))
    except UNREADABLE as error:
        problems.append(Problem(key, text, "a YAML value", _reason(error)))
        return
    assert isinstance(value, dict)
    node = values
    *parents, last = key.split(".")
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = node[parent] = {}
        node = child
    node[last] = value["value"]


def unresolved(typed: Any, key: str, value: Any) -> Iterator[Problem]:
    """Problems of a ${…} in a value."""
    if "${" not in str(value):
        return
    try:
        found = typed
        for name in key.split("."):  # OmegaConf.select hides some of the errors
            found = found[name]
        if OmegaConf.is_list(found):
            OmegaConf.to_container(found, resolve=True)
        elif OmegaConf.is_dict(found):
            yield Problem(key, value, "a value", "it resolves to a mapping; write the value itself")
    except (OmegaConfBaseException, RecursionError, ValueError) as error:
        reason = f"{str(error).splitlines()[0]}; write the value itself"
        yield Problem(key, value, "a value that resolves", reason)


def leaves(values: dict[str, Any], kind: type, prefix: str, problems: list[Problem]) -> list[tuple[str, Any]]:
    """(dotted key, value) of every known leaf. A new entry of a mapping comes first as a blank, to be filled.

    Unknown keys become problems.
    """
    hints = get_type_hints(kind)
    leaves: list[tuple[str, Any]] = []
    for name, value in values.items():
        key, hint = f"{prefix}{name}", hints.get(str(name))
        if hint is None:
            close = difflib.get_close_matches(str(name), hints, n=1)
            fix = f"did you mean '{prefix}{close[0]}'?" if close else "remove it"
            problems.append(Problem(key, value, f"a known key ({', '.join(f.name for f in fields(kind))})", fix))
        elif is_dataclass(hint) and isinstance(hint, type):
            leaves += _nested(value, hint, key, problems)
        elif get_origin(hint) is dict:
            inner: Any = get_args(hint)[1]
            if not isinstance(value, dict):
                problems.append(Problem(key, value, "a mapping", f"give one {inner.__name__} per name"))
                continue
            for entry_name, entry in value.items():
                place = f"{key}.{entry_name}"
                if problem := _misnamed(place, str(entry_name), inner):
                    problems.append(problem)
                    continue
                if not (is_dataclass(inner) and isinstance(inner, type)):
                    leaves.append((place, entry))
                    continue
                if isinstance(entry, dict):
                    leaves.append((place, inner()))
                leaves += _nested(entry, inner, place, problems)
        elif hint is Any:
            leaves.append((key, value if isinstance(value, str) else _sources(value, key, SourceConfig, problems)))
        elif get_origin(hint) is list and is_dataclass(get_args(hint)[0]):
            listed = [value] if isinstance(value, str) else value
            leaves.append((key, _sources(listed, key, get_args(hint)[0], problems) if listed != [] else []))
        elif hint is str and isinstance(value, bool):
            leaves.append((key, str(value).lower()))  # as YAML spells it
        elif _fits(value, hint):
            leaves.append((key, value))
        else:
            problems.append(Problem(key, value, type_of(name, kind), "correct the value"))
    return leaves


def _sources(value: Any, key: str, kind: type, problems: list[Problem]) -> list[Any]:
    """The keys of each of several sources, settings of this kind; one that is a text alone is the source."""
    if not isinstance(value, list) or not value:
        fix = "write a path, an id, or a list of them"
        problems.append(Problem(key, value, "a source, or a list of sources", fix))
        return []
    found = []
    for number, entry in enumerate(value):
        place, typed = f"{key}.{number}", OmegaConf.structured(kind)
        for name, given in _nested({"source": entry} if isinstance(entry, str) else entry, kind, place, problems):
            try:
                OmegaConf.update(typed, name.removeprefix(f"{place}."), given, force_add=True)
            except (OmegaConfBaseException, OverflowError) as error:
                problems.append(Problem(name, given, "a value of the key's type", str(error).splitlines()[0]))
        if OmegaConf.missing_keys(typed):
            problems.append(Problem(f"{place}.source", None, "a source", "name the file or the data set"))
        found.append(OmegaConf.to_container(typed))
    return found


def _misnamed(place: str, name: str, kind: type) -> Problem | None:
    """Names of entries become file names and keys, so they must be plain words. A column has any name without .[]"""
    if kind is str and not set(".[]") & set(name):
        return None
    if kind is str:
        return Problem(place, name, "a column of the schema", "no schema has a column of this name; correct it")
    fits = name.isidentifier() and len(name) <= LONGEST_NAME
    return None if fits else Problem(place, name, f"a plain word of at most {LONGEST_NAME} letters", "rename it")


def _fits(value: Any, hint: Any) -> bool:
    """Refuse what OmegaConf accepts: numbers as truth values, and lists in lists of numbers or texts."""
    if hint is bool:
        return isinstance(value, (bool, str))
    return not (isinstance(value, list) and any(isinstance(item, (list, dict)) for item in value))


def _nested(value: Any, kind: type, key: str, problems: list[Problem]) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return leaves({str(k): v for k, v in value.items()}, kind, f"{key}.", problems)
    problems.append(Problem(key, value, "a mapping", f"give its keys: {', '.join(f.name for f in fields(kind))}"))
    return []


def type_of(key: str, kind: Any) -> str:
    """The name of the type of a dotted key in a config of this kind."""
    for name in key.split("."):
        kind = get_args(kind)[1] if get_origin(kind) is dict else get_type_hints(kind).get(name, Any)
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)


def load(recipe: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The recipe, a file or a shipped one's name, with the overrides applied, typed. `plan.checks` checks its bounds.

    Raises ConfigError with every unknown key, wrong type, missing value and unusable text.
    """
    path = shipped.recipe_file(recipe)
    values = read(path)
    problems: list[Problem] = []
    for text in overrides or []:
        override(values, text, problems)
    typed = copy.deepcopy(_blank())
    given = leaves(values, RunConfig, "", problems)
    for key, value in given:
        try:
            OmegaConf.update(typed, key, value, force_add=True)
        except (OmegaConfBaseException, OverflowError) as error:
            reason = str(error).splitlines()[0]
            problems.append(Problem(key, value, type_of(key, RunConfig), f"correct the value ({reason})"))
    known = {p.key for p in problems}
    dangling = [p for key, value in given if key not in known for p in unresolved(typed, key, value)]
    problems += dangling
    try:
        problems += [
            Problem(key, None, type_of(key, RunConfig), "set it in the recipe or on the command line")
            for key in (sorted(OmegaConf.missing_keys(typed)) if not dangling else ())  # it fails at such a value
        ]
        if problems:
            raise ConfigError(*problems)
        config = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        fix = f"correct the value ({str(error).splitlines()[0]})"
        raise ConfigError(Problem(error.full_key or "recipe", None, "values of the keys' types", fix)) from error
    assert isinstance(config, RunConfig)
    if unfit := list(unfit_texts(config)):
        raise ConfigError(*unfit)
    shipped.use_own_files(config, path)
    return config


@cache
def _blank() -> Any:
    """The defaults. Copying them takes a fifth of the time of making them."""
    return OmegaConf.structured(RunConfig)


def to_dict(config: RunConfig) -> dict[str, Any]:
    return asdict(config)


def to_yaml(config: RunConfig) -> str:
    return str(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))


def substance(stage: OptimizerConfig) -> dict[str, Any]:
    """The settings of a stage that its result depends on: all but SPREAD, and no schedule where it is the own one.

    So a result that was made before there were others is reused.
    """
    own = {"schedule"} if stage.schedule == COSINE_TO_TENTH else set()
    return {key: value for key, value in asdict(stage).items() if key not in SPREAD | own}


def flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(address, value) of every setting that is no section; a list is one setting."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
