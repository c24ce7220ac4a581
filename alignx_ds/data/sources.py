"""Where an axis's rows come from: a file in one of the schemas, or the embedded world."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from alignx_ds.data.rows import Record, Row
from alignx_ds.data.schemas import SCHEMAS, check_columns, read_records
from alignx_ds.data.world.rows import world_records
from alignx_ds.errors import DataError

WORLD = "world"


@dataclass(frozen=True)
class Dataset:
    """Rows of one axis, and a hash of the records they came from."""

    rows: list[Row]
    digest: str


def load(source: str, schema: str, *, held_out: bool, limit: int, seed: int) -> Dataset:
    """Read, check and parse. `limit` rows are taken from the start. Raises DataError naming file, row and column."""
    records: list[tuple[str, Record]]
    if source == WORLD:
        made = world_records(schema, held_out=held_out, count=limit, seed=seed)
        records = [(f"world, row {n}", record) for n, record in enumerate(made, start=1)]
    else:
        records = read_records(Path(source))
    check_columns(records, schema)
    parser = SCHEMAS[schema].parse_held_out if held_out else SCHEMAS[schema].parse
    rows = parser(records)[:limit]
    if not rows:
        raise DataError(f"{source}: no usable row; the file is empty or holds nothing that the {schema} schema can use")
    text = json.dumps([record for _, record in records], sort_keys=True)
    return Dataset(rows, hashlib.sha256(f"{limit} {text}".encode()).hexdigest())
