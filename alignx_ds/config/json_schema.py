"""A recipe's JSON schema, by which editors complete and check YAML: `alignx-ds config-schema > recipe.schema.json`.

It is made from the dataclasses of schema.py and those that they name: keys, types, bounds, defaults, and the comment
beside each field.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import takewhile
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from alignx_ds.config.bounds import LARGEST_FLOAT, LARGEST_INT, LONGEST_PATH, AnyText, Mark, NameIn, Tables
from alignx_ds.config.parse import LONGEST_NAME
from alignx_ds.config.schema import RunConfig, SourceConfig
from alignx_ds.mocae.bounds import OneOf, Range

Schema = dict[str, Any]
DIALECT = "http://json-schema.org/draft-07/schema#"  # the newest that the YAML language server reads in full
# A plain word, as `parse` takes it for an axis or a set: also in regular expressions whose \w is ASCII alone.
WORD = r"^(?![0-9])[^\u0000-/:-@\[-^`{-\u007f\s]+$"
COLUMN = r"^[^.\[\]]+$"
REFERENCE: Schema = {"type": "string", "pattern": r"\$\{"}  # ${another.key}, which stands for a value of any type


def of_recipes(tables: Tables) -> Schema:
    """The JSON schema of a recipe. `tables` has the names that a NameIn of a field allows."""
    return {"$schema": DIALECT, "title": "A recipe of alignx-ds", **_object(RunConfig, RunConfig(), tables)}


def _object(kind: Any, default: Any, tables: Tables) -> Schema:
    """Of a dataclass. `default` is an instance; its own defaults may differ from those of its class."""
    hints = get_type_hints(kind, include_extras=True)
    said = _comments(kind)
    keys, needed = {}, []
    for field in fields(kind):
        value = getattr(default, field.name)
        key = _value(hints[field.name], value, tables)
        if field.default == MISSING or "required" in key:
            needed.append(field.name)
        elif not is_dataclass(value):
            key["default"] = value
        keys[field.name] = key | ({"description": said[field.name]} if field.name in said else {})
    found: Schema = {"type": "object", "properties": keys, "additionalProperties": False}
    about = inspect.cleandoc(kind.__doc__ or "")
    if not about.startswith(f"{kind.__name__}("):  # what `dataclass` writes where there is none
        found["description"] = about
    return found | ({"required": needed} if needed else {})


def _entry(kind: Any, tables: Tables) -> Schema:
    return _object(kind, kind(), tables)


def _value(hint: Any, default: Any, tables: Tables) -> Schema:
    """Of a key. A list of sources may also be a text, the only source, and so may each of its entries."""
    kind, mark = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
    if is_dataclass(kind):
        return _object(kind, default, tables)
    if kind is Any:
        return {"anyOf": [_text(mark), _sources(SourceConfig, tables, 1)]}
    if get_origin(kind) is dict:
        return _mapping(get_args(kind)[1], tables)
    if get_origin(kind) is list and is_dataclass(get_args(kind)[0]):
        return {"anyOf": [{"type": "string"}, _sources(get_args(kind)[0], tables, 0)]}
    if get_origin(kind) is list:
        return {"type": "array", "items": _value(get_args(kind)[0], None, tables)}
    return _scalar(kind, mark, tables)


def _sources(kind: Any, tables: Tables, least: int) -> Schema:
    entry = {"anyOf": [{"type": "string"}, _entry(kind, tables)]}
    return {"type": "array", "items": entry, "minItems": least}


def _mapping(hint: Any, tables: Tables) -> Schema:
    """Entries of any name. `columns` has names of a schema's columns, and the others names that become keys."""
    inner, mark = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
    names: Schema = {"pattern": COLUMN} if inner is str else {"pattern": WORD, "maxLength": LONGEST_NAME}
    entry: Schema = {"type": ["string", "number", "boolean"]}  # of Any: a value of a chat template
    if inner is not Any:
        entry = _entry(inner, tables) if is_dataclass(inner) else _scalar(inner, mark, tables)
    return {"type": "object", "propertyNames": names, "additionalProperties": entry}


def _scalar(kind: Any, mark: Mark | None, tables: Tables) -> Schema:
    match mark:
        case OneOf(choices):
            return _choice(choices)
        case NameIn(table, optional):
            return _choice([*([""] if optional else []), *tables[table]])
        case AnyText():
            return _text(mark)
    if kind is bool:
        return {"anyOf": [{"type": "boolean"}, REFERENCE]}
    return {"anyOf": [{"type": "integer" if kind is int else "number", **_bounds(kind, mark)}, REFERENCE]}


def _choice(choices: Any) -> Schema:
    truths = [text == "true" for text in choices if text in ("true", "false")]  # YAML reads them as truth values
    return {"anyOf": [{"enum": [*choices, *truths]}, REFERENCE]}


def _text(mark: AnyText) -> Schema:
    return {"type": "string"} if mark.lines else {"type": "string", "maxLength": LONGEST_PATH}


def _bounds(kind: Any, mark: Range | None) -> Schema:
    ends = Range() if mark is None else mark
    largest = LARGEST_INT if kind is int else LARGEST_FLOAT
    most = {} if ends.below is not None else {"maximum": largest if ends.most is None else ends.most}
    found = {"minimum": ends.least, "exclusiveMinimum": ends.above, "exclusiveMaximum": ends.below, **most}
    return {name: end for name, end in found.items() if end is not None}


@cache
def _comments(kind: type) -> dict[str, str]:
    """The comment above and beside each field of a dataclass; of an inherited field, that of the class which has it."""
    found: dict[str, str] = {}
    for parent in reversed(kind.__mro__[:-1]):
        found |= dict(_own_comments(parent))
    return found


def _own_comments(kind: type) -> Iterator[tuple[str, str]]:
    lines = textwrap.dedent(inspect.getsource(kind)).splitlines()
    (body,) = ast.parse("\n".join(lines)).body
    assert isinstance(body, ast.ClassDef)
    for field in body.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            before = map(str.strip, reversed(lines[: field.lineno - 1]))
            above = list(takewhile(lambda line: line.startswith("#"), before))[::-1]
            end = (field.end_lineno or 1) - 1
            beside = lines[end].encode()[field.end_col_offset or 0 :].decode().strip()
            text = " ".join(line.lstrip("# ") for line in [*above, beside] if line)
            if text:
                yield field.target.id, text
