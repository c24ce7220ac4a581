"""Records of a data set of the Hugging Face hub, of a directory of files, and of what `datasets.save_to_disk` wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from alignx_ds.data.files import READERS, PlacedRecord, file_type, read_records
from alignx_ds.errors import DataError, UnreachableError

SAVED = ("state.json", "dataset_dict.json")  # `save_to_disk` writes the first for one split, the second for several


def read_data_set(path: str) -> Iterator[PlacedRecord]:
    """Stream a directory or a data set of the hub; the split is `train` unless the path names another."""
    name, *rest = path.split(":")
    split, config = (rest[-1] if rest else "train"), (rest[0] if len(rest) == 2 else None)
    if not os.path.isdir(name):
        yield from _stream(path, name, config, split)
    elif any((Path(name) / saved).is_file() for saved in SAVED):
        yield from _saved(path, Path(name), split if rest else "")
    else:
        files = _files(path, Path(name), config, split)
        if all(file_type(file) in READERS for file in files):
            rows = chain.from_iterable(read_records(file) for file in files)
            first = next(rows, None)
            if first is None:
                raise DataError(f"{path}: the data set has no rows")
            yield from chain([first], rows)
        else:
            yield from _stream(path, name, config, split)


def _stream(path: str, name: str, config: str | None, split: str) -> Iterator[PlacedRecord]:
    import datasets

    with _explained(path):
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, record in enumerate(rows, start=1):
            yield f"{path}, row {number}", dict(record)


def _saved(path: str, directory: Path, split: str) -> Iterator[PlacedRecord]:
    import datasets

    with _explained(path):
        saved: Any = datasets.load_from_disk(str(directory))
        if isinstance(saved, datasets.DatasetDict):
            _check_split(path, split or "train", list(map(str, saved)))
            saved = saved[split or "train"]
        elif split:
            problem = "has no splits: it is one split that save_to_disk wrote"
            raise DataError(f"{path}: {directory} {problem}; leave out ':{split}'")
        for number, record in enumerate(saved, start=1):
            yield f"{path}, row {number}", dict(record)


def _files(path: str, directory: Path, config: str | None, split: str) -> list[Path]:
    """The files of a split. `datasets` chooses them by their names, as it does for directories of the hub."""
    import datasets

    with _explained(path):
        builder = datasets.load_dataset_builder(str(directory), config)
    splits = {str(name): [Path(file) for file in files] for name, files in (builder.config.data_files or {}).items()}
    _check_split(path, split, list(splits))
    known = {file.resolve() for files in splits.values() for file in files}
    for file in sorted(directory.rglob("*")) if config is None else ():
        hidden = any(part.startswith((".", "__")) for part in file.relative_to(directory).parts)
        of_data = file_type(file) in READERS and file.is_file() and not file.name.startswith("dataset_info")
        if of_data and not hidden and file.resolve() not in known:
            fix = "put files of one type and without other splits' names there, or list files in `train`"
            raise DataError(f"{path}: {file} would not be read, because of its type or its name; {fix}")
    return splits[split]


def _check_split(path: str, split: str, known: list[str]) -> None:
    if split not in known:
        fix = f"write {path.split(':')[0]}:{known[0]}" if known else "check the directory"
        raise DataError(f"{path}: has no split '{split}', it has {', '.join(known) or 'none'}; {fix}")


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn the errors of `datasets` into ours."""
    import datasets
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    try:
        yield
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
