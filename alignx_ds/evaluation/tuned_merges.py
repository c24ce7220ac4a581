"""The merges' scales and densities, chosen on the calibration split instead of given (`baselines.tune`)."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import product
from math import log
from pathlib import Path
from statistics import mean

from alignx_ds.baselines.merged import merge_of
from alignx_ds.config.schema import MERGES, BaselinesConfig, RunConfig
from alignx_ds.data.encode import LabelledExamples, pad_token
from alignx_ds.data.inputs import EncodedData
from alignx_ds.evaluation.compared import load_merged
from alignx_ds.evaluation.likelihood import perplexity_by_axis
from alignx_ds.models.base import BaseModel
from alignx_ds.runtime import console, signals

GRIDS: dict[str, dict[str, tuple[float, ...]]] = {  # by merge, the values that are tried of each of its settings
    "task_arithmetic": {"arithmetic_scale": (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)},
    "ties": {"ties_scale": (0.5, 1.0, 1.5, 2.0), "ties_density": (0.2, 0.8)},
    "dare": {"dare_scale": (0.1, 0.2, 0.4, 0.7), "dare_density": (0.5, 0.8)},
}
ROWS = 32  # of each axis's calibration split, at most


def tuned(config: RunConfig, base: BaseModel, data: EncodedData, specialists: list[Path]) -> BaselinesConfig:
    """The settings whose merges have the lowest mean over axes of the log perplexity. Raises Stopped. Collective."""
    found, rows, pad_id = config.baselines, _rows(config, data), pad_token(base.tokenizer)
    for name in (name for name in MERGES if name in found.make):
        tried: dict[tuple[float, ...], float] = {}
        for values in product(*GRIDS[name].values()):
            signals.stop_if_requested("the merges' tuning")
            merge, _ = merge_of(name, _with(found, name, values), list(config.axes), config.seed)
            model = load_merged(base, specialists, merge)
            tried[values] = mean(map(log, perplexity_by_axis(model, rows, config, pad_id).values()))
        best = min(tried, key=lambda values: tried[values])
        found = _with(found, name, best)
        settings = ", ".join(f"{key}={value:g}" for key, value in zip(GRIDS[name], best, strict=True))
        console.say(f"{name}: {settings}, of {len(tried)} settings that were tried")
    return found


def _with(settings: BaselinesConfig, name: str, values: tuple[float, ...]) -> BaselinesConfig:
    changed = copy.copy(settings)
    for key, value in zip(GRIDS[name], values, strict=True):
        setattr(changed, key, value)
    return changed


def _rows(config: RunConfig, data: EncodedData) -> LabelledExamples:
    """The first rows with an answer of each axis's calibration split."""
    chosen, counts = LabelledExamples([], []), Counter[int]()
    for example, expert in zip(data.calibration_rows.examples, data.calibration_rows.experts, strict=True):
        if expert and example.answer_length and counts[expert] < ROWS:
            counts[expert] += 1
            chosen.add([example], expert, [(expert,)])
    return chosen
