"""A schema's columns: what types they hold, and a record under the schema's column names instead of its file's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignx_ds.data.files import PlacedRecord
from alignx_ds.data.rows import Record
from alignx_ds.errors import DataError


@dataclass(frozen=True)
class Column:
    """A column's types, the names that other published copies give it, and for a mapping the types of its values."""

    kinds: tuple[type, ...]
    aliases: tuple[str, ...] = ()
    values: tuple[type, ...] = (object,)


def canonical_record(
    placed: PlacedRecord, schema: str, columns: dict[str, Column], renamed: dict[str, str]
) -> PlacedRecord:
    """The record under the schema's column names, every type checked. Raises DataError naming row and column.

    `renamed` maps the schema's column names to the file's where they differ.
    """
    place, record = placed
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected an object with columns, got {type(record).__name__}")
    canonical: Record = {}
    for name, column in columns.items():
        source = renamed[name] if name in renamed else _name_in(record, name, column)
        if source not in record:
            present = ", ".join(map(str, record))
            raise DataError(f"{place}: no column '{source}', which the {schema} schema needs; it has {present}")
        _check_type(f"{place}: column '{source}'", record[source], schema, column)
        canonical[name] = checked_text(place, source, record[source])
    return place, canonical


def _name_in(record: Record, name: str, column: Column) -> str:
    return next((alias for alias in column.aliases if name not in record and alias in record), name)


def _check_type(where: str, value: Any, schema: str, column: Column) -> None:
    if not isinstance(value, column.kinds):
        wanted = " or ".join(kind.__name__ for kind in column.kinds)
        found = "has no value" if value is None else f"is {type(value).__name__}"
        raise DataError(f"{where} {found}, the {schema} schema needs {wanted}")
    for key, item in value.items() if isinstance(value, dict) else ():
        if not isinstance(item, column.values):
            wanted = column.values[0].__name__
            raise DataError(f"{where} has {type(item).__name__} at '{key}', the {schema} schema needs {wanted}")


def checked_text(place: str, column: str, value: Any) -> Any:
    """The value, a text or a list or mapping of texts. Raises DataError for what is no text or no valid Unicode."""
    for text in value if isinstance(value, (list, dict)) else [value]:
        if isinstance(value, list) and not isinstance(text, str):
            raise DataError(f"{place}: column '{column}' is a list with {type(text).__name__}; it needs texts")
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                problem = f"column '{column}' is no valid Unicode at character {error.start}"
                raise DataError(f"{place}: {problem}; remove the character") from error
    return value
