"""Write the world's rows in the published file formats: Alpaca JSON, BeaverTails JSON lines, TruthfulQA CSV.

Composite prompts and dialogues are JSON lines in the schema `labelled`.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TextIO

from alignx_ds.data.rows import Record
from alignx_ds.data.world.composites import SETS, labelled_records
from alignx_ds.data.world.rows import world_records
from alignx_ds.errors import DataError

FILES = {
    "alpaca": "json",
    "beavertails": "jsonl",
    "truthfulqa": "csv",
    "plain": "jsonl",
    **dict.fromkeys(SETS, "jsonl"),
}


def write_files(directory: Path, rows: int, seed: int) -> list[Path]:
    """A train and a held-out file per schema. Raises DataError where a file exists already."""
    if rows < 1:
        raise DataError(f"--rows {rows}: give at least 1")
    if directory.exists() and not directory.is_dir():
        raise DataError(f"{directory}: is a file; give a directory")
    targets = {
        (schema, part): directory / f"{schema}_{part}.{suffix}"
        for schema, suffix in FILES.items()
        for part in ("train", "held_out")
    }
    existing = [str(path) for path in targets.values() if path.exists()]
    if existing:
        raise DataError(f"{', '.join(existing)}: exists already; choose an empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    for (schema, part), path in targets.items():
        make = labelled_records if schema in SETS else world_records
        records = make(schema, held_out=part == "held_out", count=rows, seed=seed)
        with path.open("w", encoding="utf-8", newline="") as file:
            _write(records, path.suffix, file)
    return list(targets.values())


def _write(records: list[Record], suffix: str, file: TextIO) -> None:
    if suffix == ".json":
        json.dump(records, file, indent=1)
    elif suffix == ".jsonl":
        file.writelines(json.dumps(record) + "\n" for record in records)
    else:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
