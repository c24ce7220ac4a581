"""A finished directory's manifest: the hash of every file in it, and what the directory was made from.

A directory without a manifest is unfinished work: it is never read, and may be made again. The manifest also holds a
digest of its own content, so damage to the manifest is detected too.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from alignx_ds.errors import DataError

NAME = "manifest.json"


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(inputs: dict[str, Any]) -> str:
    """One hash of everything that a result depends on, whatever the order of the keys."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: a reader sees the old content or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, UnicodeError):
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of entries, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(directory: Path, inputs: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write a directory's manifest: hashes of its files, its inputs with their fingerprint, and facts on the result."""
    hashes = {p.name: file_hash(p) for p in sorted(directory.iterdir()) if p.is_file() and p.name != NAME}
    content = {"fingerprint": fingerprint(inputs), "inputs": inputs, "files": hashes, **facts}
    write_text(directory / NAME, sealed(content))


def sealed(content: dict[str, Any]) -> str:
    """The text of a manifest with this content and the digest of it."""
    content = json.loads(json.dumps(content, allow_nan=False))  # keys and values as a reader will get them
    return json.dumps(content | {"digest": fingerprint(content)}, indent=2) + "\n"


def read(directory: Path) -> dict[str, Any]:
    try:
        content = json.loads((directory / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{directory / NAME}: can't be read ({error}); remove the directory to make it again"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{directory / NAME}: is not a manifest; remove the directory to make it again")
    if content.pop("digest", None) != fingerprint(content):
        raise DataError(f"{directory / NAME}: differs from its own digest; remove the directory to make it again")
    return content


def is_current(directory: Path, inputs: dict[str, Any]) -> bool:
    """Whether the directory was made from just these inputs. Raises DataError when a file of it has changed since."""
    if not (directory / NAME).is_file():
        return False
    content = read(directory)
    if content.get("fingerprint") != fingerprint(inputs):
        return False
    _verify(directory, content)
    return True


def read_verified(directory: Path) -> dict[str, Any]:
    """The manifest of a finished directory, every file of which still has its recorded hash. Raises DataError."""
    content = read(directory)
    _verify(directory, content)
    return content


def _verify(directory: Path, content: dict[str, Any]) -> None:
    files = content.get("files")
    if not isinstance(files, dict):
        raise DataError(f"{directory / NAME}: lists no files; remove {directory} to make it again")
    for name, expected in files.items():
        if problem := damage(directory, name, expected):
            raise DataError(f"{problem}; remove {directory} to make it again")


def damage(directory: Path, name: str, expected: str) -> str:
    """What is wrong with a file that a manifest names; empty when nothing is. Raises DataError for a name that leads
    out of the directory."""
    path = directory / name
    if Path(name).name != name or path.resolve().parent != directory.resolve():
        raise DataError(f"{directory / NAME}: file name {name!r} leaves the directory; no run wrote this manifest")
    return "" if path.is_file() and file_hash(path) == expected else f"{path}: differs from its manifest"
