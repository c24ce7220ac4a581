"""Versions of installed packages, this one included."""

from __future__ import annotations

from importlib import metadata


def version(distribution: str) -> str:
    """Of an installed distribution. A source tree on PYTHONPATH works too, but only an installation has a version."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
