"""Where records come from: a local file, a data set of the Hugging Face hub, or the embedded world."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from alignx_ds.data.files import READERS, PlacedRecord, read_records
from alignx_ds.data.schemas import canonical
from alignx_ds.data.world.rows import world_records
from alignx_ds.errors import DataError, UnreachableError

WORLD = "world"
DATA_SET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")  # owner/name, owner/name:split, owner/name:config:split


@dataclass(frozen=True)
class Source:
    """A source in one of the schemas. `columns` maps the schema's column names to the file's where they differ."""

    path: str
    schema: str
    columns: dict[str, str]

    def records(self, *, held_out: bool, count: int, seed: int, limit: int = 0) -> list[PlacedRecord]:
        """All records under the schema's column names, their types checked; the first `limit` alone where it is not 0.

        `held_out`, `count` and `seed` matter to the embedded world only, whose records are generated. Raises DataError
        naming file, row and column.
        """
        placed: Iterable[PlacedRecord]
        if self.path == WORLD:
            records = world_records(self.schema, held_out=held_out, count=count, seed=seed)
            placed = ((f"world, row {n}", record) for n, record in enumerate(records, start=1))
        elif is_file(self.path):
            placed = read_records(Path(self.path))
        else:
            placed = _read_hub(self.path)
        return [canonical(item, self.schema, self.columns) for item in islice(placed, limit or None)]


def is_file(path: str) -> bool:
    return Path(path).suffix in READERS or os.path.isfile(path)  # pathlib's is_file raises on names that are too long


def names_a_source(path: str) -> bool:
    """Whether this can be a source: the world, an existing file, a directory of data, or the id of a data set."""
    if path == WORLD:
        return True
    if is_file(path):
        return os.path.isfile(path)
    return os.path.isdir(path.split(":")[0]) or DATA_SET.fullmatch(path) is not None


def _read_hub(path: str) -> Iterator[PlacedRecord]:
    """Stream a data set of the hub, or a directory of files; the split is `train` unless the path names another."""
    import datasets
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    name, *rest = path.split(":")
    split, config = (rest[-1] if rest else "train"), (rest[0] if len(rest) == 2 else None)
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, record in enumerate(rows, start=1):
            yield f"{path}, row {number}", dict(record)
    except ConnectionError as error:
        raise UnreachableError(f"{path}: the hub can't be reached; check the network, or give a local file") from error
    except (DatasetNotFoundError, DataFilesNotFoundError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        fix = "check the id and the network, or give a local file"
        raise DataError(f"{path}: the data set could not be read ({reason}); {fix}") from error
    except StopIteration as error:  # out of `datasets`, when the files are empty
        raise DataError(f"{path}: the data set has no rows") from error
    except (ValueError, OverflowError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # an unknown split or config, an unreadable file, or a script, which `datasets` does not run
        raise DataError(f"{path}: {' '.join(str(error).split())}") from error
