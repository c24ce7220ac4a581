"""Specialists of the embedded world, trained and judged without stage 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.inputs import RunInputs, read_inputs
from alignx_ds.evaluation.compared import load_specialist
from alignx_ds.evaluation.evaluate import Evaluation, Result, System
from alignx_ds.plan.checks import check
from alignx_ds.runs import manifest
from alignx_ds.runs.outputs import Outputs
from alignx_ds.stages.finetune import FineTune, fine_tune
from alignx_ds.stages.stage import StageContext


@dataclass(frozen=True)
class Specialists:
    """What was trained, by axis, and how its answers were judged."""

    inputs: RunInputs
    out: Outputs
    made: dict[str, Path]
    judged: dict[str, Result]

    def score(self, axis: str) -> float:
        return float(self.judged[axis].metrics[axis]["score"])


def only(config: RunConfig, axes: Sequence[str]) -> None:
    """Leave these axes in the recipe. Rows that need another one, which show what to leave as it is, need none then."""
    config.axes = {axis: config.axes[axis] for axis in axes}
    for settings in config.axes.values():
        for source in settings.train if isinstance(settings.train, list) else ():
            if not set(source.get("needs", [])) <= set(axes):
                source["needs"] = ["generalist"]


def trained(config: RunConfig) -> Specialists:
    """A specialist for each axis, without an expert's factors; what its output directory holds is not trained again."""
    inputs = read_inputs(config, check(config, 1))
    base, data, out = inputs.base, inputs.data, Outputs.of(config)
    context = StageContext(config, base, data, out)
    made = {axis: fine_tune(context, FineTune(axis, (axis,))) for axis in config.axes}
    systems = [
        System(axis, {"specialist": manifest.read(path)["fingerprint"]}, partial(load_specialist, base, path))
        for axis, path in made.items()
    ]
    evaluation = Evaluation(config, base, data, out)
    evaluation.evaluate_all(systems)
    return Specialists(inputs, out, made, evaluation.judge_all(systems))
