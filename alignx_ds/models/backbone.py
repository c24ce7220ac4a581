"""Loads models with their weights: any causal LM, a run's base model, an aligned model. Nothing else loads weights.

All of them are read from safetensors, and no code of a model directory is run (models/pretrained.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.base import KEY, BaseModel
from alignx_ds.models.pretrained import MODEL, NO_PICKLE, reading

ALIGNED = "an aligned model that this version can read"
ALIGN_AGAIN = "run `alignx-ds align` again"


def load_causal_lm(directory: Path, key: str, given: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A causal LM of any architecture that transformers can load; "auto" is the dtype it was saved in, on the CPU.

    Raises ConfigError for the key where the directory holds no such model, or only a part of one.
    """
    with reading(key, given, "model"):
        found: tuple[PreTrainedModel, dict[str, Any]]
        found = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True, **NO_PICKLE)
    model, info = found
    if missing := sorted(info["missing_keys"]):
        fix = f"it lacks {missing[0]}, which would be random numbers; give a whole checkpoint"
        raise ConfigError(Problem(key, given, MODEL, fix))
    for name, buffer in model.named_buffers():  # computed from the config, like the frequencies of the positions
        if not torch.isfinite(buffer).all():
            fix = f"its config.json makes {name} NaN or infinite; correct its rope parameters"
            raise ConfigError(Problem(key, given, MODEL, fix))
    return model


def load_backbone(base: BaseModel) -> PreTrainedModel:
    """The base model with its weights in the run's dtype; where an HfDeepSpeedConfig is alive, sharded by ZeRO-3.

    Raises ConfigError where a weight is not finite. Collective: each rank looks at a part of them.
    """
    base.check_finite()
    return load_causal_lm(base.path, KEY, base.settings.path, base.dtype)


def load_aligned(directory: Path, dtype: torch.dtype | str = "auto") -> AlignXForCausalLM:
    """An aligned model, all experts in this process (the fused path); "auto" is the dtype it was saved in.

    Raises ConfigError when its files can't be read, or don't hold every weight of today's modules.
    """
    given = str(directory)
    with reading("model", given, "config.json or its weights", ALIGNED, f"another version wrote them; {ALIGN_AGAIN}"):
        found: tuple[AlignXForCausalLM, dict[str, Any]]
        found = AlignXForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True, **NO_PICKLE)
    model, info = found
    wrong = ""
    if info["missing_keys"]:
        wrong = f"its model has no {min(info['missing_keys'])}: another version wrote it"
    elif info["unexpected_keys"]:
        wrong = f"its model has {min(info['unexpected_keys'])} too: another version wrote it"
    elif damaged := next((name for name, t in model.named_parameters() if not torch.isfinite(t).all()), ""):
        wrong = f"its {damaged} holds NaN or infinite values: it is damaged"
    if wrong:
        raise ConfigError(Problem("model", given, ALIGNED, f"{wrong}; {ALIGN_AGAIN}"))
    return model
