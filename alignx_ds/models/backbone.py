"""Loads models with their weights: any causal LM, a run's base model, an aligned model. Nothing else loads weights.

All of them are read from safetensors, and no code of a model directory is run (models/pretrained.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignx_ds.errors import DataError
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.base import BaseModel
from alignx_ds.models.pretrained import NO_PICKLE


def load_causal_lm(directory: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A causal LM of any architecture that transformers can load; "auto" is the dtype it was saved in, on the CPU.

    Raises OSError or ValueError where the directory holds no such model.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **NO_PICKLE)
    return model


def load_backbone(base: BaseModel) -> PreTrainedModel:
    """The base model with its weights in the run's dtype; where an HfDeepSpeedConfig is alive, sharded by ZeRO-3."""
    return load_causal_lm(base.path, base.dtype)


def load_aligned(directory: Path, dtype: torch.dtype | str = "auto") -> AlignXForCausalLM:
    """An aligned model, all experts in this process (the fused path); "auto" is the dtype it was saved in.

    Raises DataError when its files can't be read, or don't hold every weight of today's modules.
    """
    again = "run `alignx-ds align` again"
    found: tuple[AlignXForCausalLM, dict[str, Any]]
    try:
        found = AlignXForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True, **NO_PICKLE)
    except (OSError, RuntimeError, TypeError, SafetensorError) as error:  # TypeError: settings of another version
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{directory}: its model can't be loaded ({reason}); {again}") from error
    model, info = found
    if info["missing_keys"]:
        missing = min(info["missing_keys"])
        raise DataError(f"{directory}: its model has no {missing}: another version wrote it; {again}")
    return model
