"""A function of the user's own, named on the command line as MODULE:FUNCTION."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignx_ds.errors import ConfigError, Problem

FORM = "MODULE:FUNCTION"


def load(name: str, key: str) -> Callable[..., Any]:
    """The function; its module is looked for in the working directory too. Raises ConfigError for the key."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConfigError(Problem(key, name, FORM, "write e.g. scorers:length for the function length in scorers.py"))
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # an installed command does not look there
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        fix = f"{error}; start in the directory that holds it, or set PYTHONPATH"
        raise ConfigError(Problem(key, name, "a module that can be imported", fix)) from error
    if not callable(found):
        raise ConfigError(Problem(key, name, FORM, f"{module} has no function {function}"))
    made: Callable[..., Any] = found
    return made
