"""The directory that an export writes: whole, or not there at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignx_ds.errors import ConfigError, Problem


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to write into. It is renamed to `out` when the block ends, and removed when the block fails.

    Raises ConfigError when there is something at `out`, or when it can't be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fix = "choose another; nothing was touched"
        raise ConfigError(Problem("OUT", str(out), "a new or an empty directory", fix))
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        fix = f"it can't be made ({error.strerror}); choose another"
        raise ConfigError(Problem("OUT", str(out), "a directory that can be written", fix)) from error
    try:
        yield partial
        for path in (partial, *partial.rglob("*")):  # safetensors writes files that only their owner may read
            path.chmod(0o755 if path.is_dir() else 0o644)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
