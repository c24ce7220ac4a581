"""A function of the user's own, named on the command line as MODULE:FUNCTION."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignx_ds.errors import ConfigError, Problem

FORM = "MODULE:FUNCTION"


def load(name: str, key: str) -> Callable[..., Any]:
    """The function; its module is looked for in the working directory too. Raises ConfigError for the key."""
    if not all(name.partition(":")):
        raise ConfigError(Problem(key, name, FORM, "write e.g. scorers:length for the function length in scorers.py"))
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # an installed command does not look there
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        fix = f"{error}; correct it, start in the directory that holds the module, or set PYTHONPATH"
        raise ConfigError(Problem(key, name, FORM, fix)) from error
    if not callable(found):
        raise ConfigError(Problem(key, name, FORM, "it is no function; name one"))
    made: Callable[..., Any] = found
    return made
