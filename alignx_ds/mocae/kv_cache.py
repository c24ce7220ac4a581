"""The KV cache by whatever name this release of transformers gives it: 5.24 renamed `past_key_values` to `cache`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import Cache, GenerationMixin

ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


def kv_cache(values: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments or the outputs of a call; None where there is none."""
    return next((value for value in values.values() if isinstance(value, Cache)), None)
