"""Directories that describe themselves: a manifest with the hash of every file and of what they were made from.

A directory without a whole manifest is unfinished work: it is never read, and may be made again. The manifest's own
digest is over everything else in it, so a flipped bit is seen there too.
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
    """One hash of everything that a result depends on."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """All or nothing: a reader sees the old file or the new one."""
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
    """Wait until a file, or a directory's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(directory: Path, inputs: dict[str, Any], facts: dict[str, Any]) -> None:
    """Seal a directory: hashes of its files, its inputs and their fingerprint, and facts about the result."""
    hashes = {p.name: file_hash(p) for p in sorted(directory.iterdir()) if p.is_file() and p.name != NAME}
    content = {"fingerprint": fingerprint(inputs), "inputs": inputs, "files": hashes, **facts}
    write_text(directory / NAME, sealed(content))


def sealed(content: dict[str, Any]) -> str:
    """The text of a manifest with this content, and the digest that tells whether it is still the same."""
    content = json.loads(json.dumps(content, allow_nan=False))  # as it will be read, to the type of every key
    return json.dumps(content | {"digest": fingerprint(content)}, indent=2) + "\n"


def read(directory: Path) -> dict[str, Any]:
    try:
        content = json.loads((directory / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{directory / NAME}: can't be read ({error}); remove the directory to make it again"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{directory / NAME}: is not one of our manifests; remove the directory to make it again")
    if content.pop("digest", None) != fingerprint(content):
        raise DataError(f"{directory / NAME}: differs from its own digest; remove the directory to make it again")
    return content


def is_current(directory: Path, inputs: dict[str, Any]) -> bool:
    """Whether the directory was made from just these inputs and every file still has its recorded hash."""
    if not (directory / NAME).is_file():
        return False
    content = read(directory)
    if content.get("fingerprint") != fingerprint(inputs):
        return False
    files = content.get("files")
    if not isinstance(files, dict):
        raise DataError(f"{directory / NAME}: lists no files; remove {directory} to make it again")
    for name, expected in files.items():
        if problem := damage(directory, name, expected):
            raise DataError(f"{problem}; remove {directory} to make it again")
    return True


def damage(directory: Path, name: str, expected: str) -> str:
    """What is wrong with a file that a manifest names, or nothing. Raises DataError for a name that leads elsewhere."""
    path = directory / name
    if Path(name).name != name or path.resolve().parent != directory.resolve():
        raise DataError(f"{directory / NAME}: file name {name!r} leaves the directory; the manifest is not ours")
    return "" if path.is_file() and file_hash(path) == expected else f"{path}: differs from its manifest"
