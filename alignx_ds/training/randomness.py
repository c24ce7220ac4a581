"""Every random number generator that a training job may draw from: seeded per rank, saved and restored exactly."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from alignx_ds.runs import manifest
from alignx_ds.runtime import distributed


def seed(number: int, step: int = 0) -> None:
    """Seed Python's, numpy's and torch's generators from `number`, the step that a job starts at, and the rank."""
    mixed = int(np.random.SeedSequence([number, step, distributed.rank()]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def save(directory: Path) -> None:
    """Write the state of this rank's generators to rng-RANK.safetensors."""
    version, words, _ = random.getstate()
    legacy = np.random.get_state(legacy=False)
    assert version == 3 and isinstance(legacy, dict)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor([*legacy["state"]["key"].tolist(), legacy["state"]["pos"]], dtype=torch.int64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, _path(directory))
    manifest.sync(_path(directory))


def load(directory: Path) -> None:
    """Restore this rank's generators from what `save` wrote at the same world size."""
    tensors = load_file(_path(directory))
    random.setstate((3, tuple(tensors["python"].tolist()), None))
    *key, position = tensors["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, 0, 0.0))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _path(directory: Path) -> Path:
    return directory / f"rng-{distributed.rank()}.safetensors"
