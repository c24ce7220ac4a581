"""A schema's columns: what types they hold, and a record under the schema's column names instead of its file's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from alignx_ds.data.files import PlacedRecord
from alignx_ds.data.rows import Dropped, Record
from alignx_ds.errors import DataError


@dataclass(frozen=True)
class Column:
    """A column's types, the names that other published copies give it, and for a mapping the types of its values.

    A record without an `optional` column has None there.
    """

    kinds: tuple[type, ...]
    aliases: tuple[str, ...] = ()
    values: tuple[type, ...] = (object,)
    items: type = str  # of a list
    optional: bool = False


@dataclass(frozen=True)
class Records:
    """A source's records under the schema's column names, and those that lack a value that the schema needs."""

    usable: list[PlacedRecord]
    dropped: list[Dropped]


def canonical_records(
    placed: Iterable[PlacedRecord], schema: str, columns: dict[str, Column], renamed: dict[str, str]
) -> Records:
    """The records under the schema's column names, every type checked. One without a needed value is dropped.

    `renamed` maps the schema's column names to the file's where they differ. Raises DataError naming row and column,
    also for a column that no record has.
    """
    found = Records([], [])
    absent: dict[str, str] = {}  # a column that no record had so far: what to say of the first record
    for number, (place, record) in enumerate(placed):
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected an object with columns, got {type(record).__name__}")
        sources = {name: renamed[name] if name in renamed else _name_in(record, name, c) for name, c in columns.items()}
        for name, source in sources.items():
            if source in record:
                absent.pop(name, None)
            elif number == 0 and (name in renamed or not columns[name].optional):
                present = ", ".join(map(str, record))
                absent[name] = f"{place}: no column '{source}', which the {schema} schema needs; it has {present}"
        canonical: Record = {}
        for name, column in columns.items():
            value = record.get(sources[name])
            if value is not None:
                _check_type(f"{place}: column '{sources[name]}'", value, schema, column)
                if isinstance(value, list):
                    checked_items(place, sources[name], value, column.items)
                checked_text(place, sources[name], value)
            canonical[name] = value
        missing = next((n for n, column in columns.items() if canonical[n] is None and not column.optional), None)
        if missing is None:
            found.usable.append((place, canonical))
        else:
            found.dropped.append(Dropped(place, f"no value in column '{sources[missing]}'"))
    if absent:
        raise DataError(next(iter(absent.values())))
    return found


def _name_in(record: Record, name: str, column: Column) -> str:
    return next((alias for alias in column.aliases if name not in record and alias in record), name)


def _check_type(where: str, value: Any, schema: str, column: Column) -> None:
    if not isinstance(value, column.kinds):
        wanted = " or ".join(kind.__name__ for kind in column.kinds)
        raise DataError(f"{where} is {type(value).__name__}, the {schema} schema needs {wanted}")
    for key, item in value.items() if isinstance(value, dict) else ():
        if not isinstance(item, column.values):
            wanted = column.values[0].__name__
            raise DataError(f"{where} has {type(item).__name__} at '{key}', the {schema} schema needs {wanted}")


def checked_text(place: str, column: str, value: Any) -> Any:
    """The value, a text, or a list or mapping with texts. Raises DataError for a text that is no valid Unicode."""
    for text in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                problem = f"column '{column}' is no valid Unicode at character {error.start}"
                raise DataError(f"{place}: {problem}; remove the character") from error
    return value


def checked_items(place: str, column: str, value: list[Any], kind: type = str) -> None:
    """Raises DataError for an item of another type."""
    for item in value:
        if not isinstance(item, kind):
            wanted = "texts" if kind is str else "objects"
            raise DataError(f"{place}: column '{column}' is a list with {type(item).__name__}; it needs {wanted}")
