"""The judges by the names that a recipe gives them. Their models are loaded when they are first asked."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from alignx_ds.config.schema import JudgesConfig
from alignx_ds.evaluation.judges.protocol import Judge

_FACTORIES = {
    "task": "world:make_task",
    "safety": "world:make_safety",
    "truth": "world:make_truth",
    "alpaca_eval": "pairwise:make",
    "beaver_dam": "moderation:make_beaver_dam",
    "llama_guard": "moderation:make_llama_guard",
    "offline_safety": "offline:make",
    "truthfulqa": "truthfulqa:make",
    "honeset": "honeset:make",
    "refusal": "refusal:make",
}
JUDGES = tuple(_FACTORIES)


def make(name: str, settings: JudgesConfig) -> Judge:
    """Raises ConfigError when what the judge needs is not set or not there."""
    module, function = _FACTORIES[name].split(":")
    factory: Callable[[JudgesConfig], Judge] = getattr(import_module(f"{__package__}.{module}"), function)
    return factory(settings)
