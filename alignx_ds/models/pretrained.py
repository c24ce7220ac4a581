"""Model directories are read as data: no code in one is run, and no file outside of it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignx_ds.errors import ConfigError, Problem

INDEX = "model.safetensors.index.json"
# For every from_pretrained. Without it, transformers asks at the terminal whether to run a directory's code.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
NO_PICKLE: dict[str, Any] = {**NO_CODE, "use_safetensors": True}  # for every from_pretrained that reads weights


def check(directory: Path, key: str, given: str) -> Path:
    """The directory, if its model is plain data. Raises ConfigError for the key, with the value that was given."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if "auto_map" in _read(directory / name, key, given):
            fix = f"its {name} names code of its own (auto_map), which is never run; take a known architecture"
            raise ConfigError(Problem(key, given, "a model without code", fix))
    files = _read(directory / INDEX, key, given).get("weight_map", {})
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ConfigError(Problem(key, given, "a model with its weights", f"its {INDEX} names no files; save it again"))
    leaving = sorted({file for file in files.values() if Path(file).name != file or file == ".."})
    if leaving:
        fix = f"its {INDEX} names {leaving[0]!r}, which lies elsewhere; save it again"
        raise ConfigError(Problem(key, given, "a model with its weights beside it", fix))
    return directory


def _read(path: Path, key: str, given: str) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(Problem(key, given, "a model", f"its {path.name} can't be read ({error})")) from error
    if not isinstance(content, dict):
        raise ConfigError(Problem(key, given, "a model", f"its {path.name} is not a JSON object; save it again"))
    return content
