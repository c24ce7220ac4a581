"""Where records come from: a local file, a data set of the Hugging Face hub, or the embedded world."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from alignx_ds.data.columns import Records
from alignx_ds.data.directories import read_data_set
from alignx_ds.data.files import READERS, PlacedRecord, file_type, read_records
from alignx_ds.data.schemas import canonical
from alignx_ds.data.world.rows import SOURCES, source_records
from alignx_ds.errors import DataError

WORLD = "world"
DATA_SET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")  # owner/name, owner/name:split, owner/name:config:split


@dataclass(frozen=True)
class Source:
    """A source in one of the schemas. `columns` maps the schema's column names to the file's where they differ."""

    path: str
    schema: str
    columns: dict[str, str]

    def read(self, *, held_out: bool, count: int, seed: int, limit: int = 0) -> Records:
        """All records under the schema's column names, their types checked; the first `limit` alone where it is not 0.

        `held_out`, `count` and `seed` matter to the embedded world only, whose records are generated. Raises DataError
        naming file, row and column.
        """
        placed = self._placed(held_out, count, seed)
        return canonical(islice(placed, limit or None), self.schema, self.columns)

    def column(self, name: str) -> dict[str, Any]:
        """The values of one of the file's own columns, by place. Raises DataError naming the row that lacks it."""
        found = {}
        for place, record in self._placed(held_out=True, count=1000, seed=0):
            if not isinstance(record, dict) or name not in record:
                present = f"; it has {', '.join(map(str, record))}" if isinstance(record, dict) else ""
                raise DataError(f"{place}: no column '{name}'{present}")
            found[place] = record[name]
        return found

    def _placed(self, held_out: bool, count: int, seed: int) -> Iterable[PlacedRecord]:
        if self.path in SOURCES:
            records = source_records(self.path, self.schema, held_out=held_out, count=count, seed=seed)
            return ((f"world, row {n}", record) for n, record in enumerate(records, start=1))
        return read_records(Path(self.path)) if is_file(self.path) else read_data_set(self.path)

    def records(self, *, held_out: bool, count: int, seed: int, limit: int = 0) -> list[PlacedRecord]:
        """The usable records that `read` finds."""
        return self.read(held_out=held_out, count=count, seed=seed, limit=limit).usable


def is_file(path: str) -> bool:
    # pathlib's is_file raises on names that are too long
    return os.path.isfile(path) or (file_type(path) in READERS and not os.path.isdir(path))


def names_a_source(path: str) -> bool:
    """Whether this can be a source: the world, an existing file, a directory of data, or the id of a data set."""
    if path in SOURCES:
        return True
    if is_file(path):
        return os.path.isfile(path)
    return os.path.isdir(path.split(":")[0]) or DATA_SET.fullmatch(path) is not None
