"""The tensors in a directory's safetensors files, by their headers: names, shapes and dtypes, without the values."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.models.pretrained import INDEX, LFS_FIX, is_lfs_pointer

SINGLE = "model.safetensors"
WEIGHTS = (SINGLE, INDEX)  # transformers looks for them in this order
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "consolidated*.pth")


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, by the file's header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: F32, BF16, I8 …

    def parts(self) -> list[Stored]:
        """The tensors of files that it consists of."""
        return [self]

    def read(self) -> Tensor:
        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor

    def read_rows(self, first: int, last: int) -> Tensor:
        """A copy of some of its rows; the others are not read. The file is not mapped any longer."""
        with safe_open(self.file, framework="pt") as file:
            rows: Tensor = file.get_slice(self.name)[first:last].clone()
        return rows


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers loads the weights from; none where it finds none. The index has been checked."""
    if (directory / SINGLE).is_file() or (directory / SINGLE).is_symlink():
        return [directory / SINGLE]
    if not (directory / INDEX).is_file():
        return []
    weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8")).get("weight_map", {})
    return [directory / name for name in sorted(set(weight_map.values()))]


def unread_weights(directory: Path) -> str:
    """What there is instead of the files that are read, with the fix; empty where there are no weights at all."""
    if shards := sorted(directory.glob("model-*.safetensors")):
        return f"its {INDEX} is missing, so {shards[0].name} can't be found; download or copy the directory again"
    if others := sorted(file for file in directory.glob("*.safetensors") if file.is_file()):
        return f"its {others[0].name} is not a name that transformers reads; give the model with its {SINGLE}"
    if pickles := sorted(file for pattern in PICKLES for file in directory.glob(pattern)):
        convert = f"AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
        return f"its {pickles[0].name} is not read, since a pickle can run code; if you trust it, convert it: {convert}"
    if others := sorted(file for pattern in ("*.gguf", "*.h5", "*.msgpack") for file in directory.glob(pattern)):
        return f"its {others[0].name} is a format that is not read; give the model that it was made from"
    return ""


def read_headers(files: Iterable[Path], key: str, given: str) -> dict[str, Stored]:
    """The tensors of all files by name; of a name in two files the last one, which is the one that is loaded.

    Raises ConfigError for the key where a file is missing, cut short, a Git LFS pointer or not safetensors.
    """
    found: dict[str, Stored] = {}
    for file in files:
        found |= {tensor.name: tensor for tensor in _header(file, key, given)}
    return found


def _header(file: Path, key: str, given: str) -> list[Stored]:
    def refusal(fix: str) -> ConfigError:
        return ConfigError(Problem(key, given, "whole safetensors files", fix))

    if not file.is_file():
        what = "a link to a file that is not there" if file.is_symlink() else "missing"
        raise refusal(f"its {file.name} is {what}; download or copy the directory again")
    if is_lfs_pointer(file):
        raise refusal(f"its {file.name} is a Git LFS pointer, not the file itself; {LFS_FIX}")
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
            return [Stored(file, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
    except (SafetensorError, OSError, ValueError) as error:
        raise refusal(f"its {file.name} can't be read ({error}): cut short or damaged; download it again") from error


def not_finite(tensors: Iterable[Stored]) -> Stored | None:
    """The first tensor with a NaN or an infinity; None where every value is a number."""
    for tensor in (part for whole in tensors for part in whole.parts()):
        values = tensor.read()
        if values.is_floating_point() and not _finite(values):
            return tensor
    return None


def _finite(values: Tensor) -> bool:
    if values.dtype.itemsize == 1:  # an 8-bit float, for which torch has no isfinite
        values = values.to(torch.bfloat16)
    return bool(torch.isfinite(values).all())
