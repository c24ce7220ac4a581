"""Model directories are read as data: no code in one is run, and no file outside of it is read.

What other libraries raise while they read one becomes a ConfigError here, in one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from alignx_ds.errors import ConfigError, Problem, Stopped, UserError
from alignx_ds.mocae.backbones import FUSED
from alignx_ds.models.registration import AUTO_MAP, MODEL_TYPE
from alignx_ds.runtime.failures import is_out_of_memory

INDEX = "model.safetensors.index.json"
# For every from_pretrained. Without it, transformers asks at the terminal whether to run a directory's code.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
NO_PICKLE: dict[str, Any] = {**NO_CODE, "use_safetensors": True}  # for every from_pretrained that reads weights
ADAPTER = "adapter_config.json"  # beside it, transformers would load the model that it names instead
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_FIX = "run `git lfs pull` there, or download it with `hf download`"
MODEL = "a model directory that save_pretrained wrote"
AGAIN = "save or download it again"
REASON = 240  # characters of a library's message


@contextmanager
def reading(key: str, given: str, what: str, allowed: str = MODEL, fix: str = AGAIN) -> Iterator[None]:
    """Whatever another library raises within becomes a ConfigError for the key; `what` is what is read.

    Errors of our own, stops and a lack of memory are no such errors and pass.
    """
    try:
        yield
    except (UserError, Stopped):
        raise
    except BaseException as error:  # a spoiled file makes libraries raise anything at all, and those in Rust panic
        panicked = type(error).__name__ == "PanicException"
        if is_out_of_memory(error) or not (panicked or isinstance(error, Exception)):
            raise
        raise ConfigError(
            Problem(key, given, allowed, f"its {what} can't be read ({_reason(error)}); {fix}")
        ) from error


def _reason(error: BaseException) -> str:
    """The type of an error and the beginning of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:REASON]}{'…' if len(text) > REASON else ''}" if text else repr(error)


def check(directory: Path, key: str, given: str) -> Path:
    """The directory, if its model is plain data. Raises ConfigError for the key, with the value that was given."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = read_object(directory / name, key, given)
        ours = content.get("model_type") == MODEL_TYPE and content.get("auto_map") == AUTO_MAP
        # Ours names what this package registers, and the file is not read; nor is code that transformers took over.
        if "auto_map" in content and not ours and not _taken_over(content):
            fix = f"its {name} names code of its own (auto_map), which is never run; take a known architecture"
            raise ConfigError(Problem(key, given, "a model without code", fix))
    files = read_object(directory / INDEX, key, given).get("weight_map", {})
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ConfigError(Problem(key, given, "a model with its weights", f"its {INDEX} names no files; save it again"))
    leaving = sorted({file for file in files.values() if Path(file).name != file or file == ".."})
    if leaving:
        fix = f"its {INDEX} names {leaving[0]!r}, which lies elsewhere; save it again"
        raise ConfigError(Problem(key, given, "a model with its weights beside it", fix))
    return directory


def _taken_over(content: dict[str, Any]) -> bool:
    """Whether its code has the names of transformers' own for an architecture of FUSED, which is what is run then."""
    kind, named = content.get("model_type"), content["auto_map"]
    if not isinstance(kind, str) or kind not in FUSED or not isinstance(named, dict):
        return False
    own = {
        "AutoConfig": f"configuration_{kind}.{CONFIG_MAPPING_NAMES[kind]}",
        "AutoModelForCausalLM": f"modeling_{kind}.{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]}",
    }  # a copy that was fine-tuned names the original's repository before it
    return all(str(path).rpartition("--")[2] == own.get(name) for name, path in named.items())


def model_type(directory: Path, key: str, given: str) -> str:
    """The architecture that its config.json names. Raises ConfigError where there is none, or where it is quantised."""
    content = read_object(directory / "config.json", key, given)
    if not content:
        fix = "it has no config.json; give a directory that save_pretrained wrote, or a hub id"
        raise ConfigError(Problem(key, given, "a model with a config.json", fix))
    if (directory / ADAPTER).is_file():
        fix = f"it holds an {ADAPTER}: it is an adapter; give its base model here, and the adapter as axes.NAME.adapter"
        raise ConfigError(Problem(key, given, "a whole model", fix))
    named = content.get("model_type")
    if not isinstance(named, str) or not named:
        fix = "its config.json has no model_type, so its architecture is unknown; write it there, e.g. 'llama'"
        raise ConfigError(Problem(key, given, "a model whose architecture is known", fix))
    quantised = content.get("quantization_config", content.get("compression_config"))
    if quantised is not None:
        method = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
        fix = f"it is quantised ({method or 'quantization_config in its config.json'}); give the model it was made from"
        raise ConfigError(Problem(key, given, "a model in float32, bfloat16 or float16", fix))
    return named


def read_config(directory: Path, key: str, given: str) -> PreTrainedConfig:
    """Its config. Raises ConfigError for the key."""
    model_type(directory, key, given)
    with reading(key, given, "config.json"):
        return AutoConfig.from_pretrained(directory, **NO_CODE)


def is_lfs_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(LFS_POINTER)) == LFS_POINTER


def read_object(path: Path, key: str, given: str) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        if is_lfs_pointer(path):
            fix = f"its {path.name} is a Git LFS pointer, not the file itself; {LFS_FIX}"
            raise ConfigError(Problem(key, given, "a model", fix))
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(Problem(key, given, "a model", f"its {path.name} can't be read ({error})")) from error
    if not isinstance(content, dict):
        raise ConfigError(Problem(key, given, "a model", f"its {path.name} is not a JSON object; save it again"))
    return content
