"""Figure 1b: each axis's score after every stage of sequential fine-tuning, beside mixed fine-tuning and AlignX.

Where the run has made them, the regularised sequence and the restored one are measured too.

A stage is the result of one fine-tune. When the run has kept its checkpoints (`checkpoints.finished=true`, and
`checkpoints.keep` large enough), the axes are also measured at every one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from alignx_ds.config.schema import RESTORED
from alignx_ds.evaluation.compared import load_specialist
from alignx_ds.runs import manifest
from alignx_ds.runtime import console
from alignx_ds.stages.finetune import MIXED, SEQUENTIAL, mixed_name, sequences, sequential_name
from alignx_ds.study import plotting
from alignx_ds.study.studied_run import StudiedRun
from alignx_ds.training.checkpoints import PREFIX
from alignx_ds.training.state import WEIGHT

BASE, ALIGNED = "base", "AlignX"
LABELS = {"scores": "score on held-out rows", "perplexity": "perplexity of held-out answers"}


@dataclass(frozen=True)
class TrainedModel:
    """A model at some point of training: `step` counts optimizer steps since the base model."""

    name: str
    step: int
    load: Callable[[], PreTrainedModel]


def measure(studied: StudiedRun) -> dict[str, Any]:
    """Every axis's perplexity and, where its judge is free, score: after each stage, and at every checkpoint."""
    points, checkpoints = stages(studied), {name: _checkpoints(studied, name) for name in ("sequential", "mixed")}
    total = len(points) + sum(map(len, checkpoints.values()))
    with console.progress("models", total) as bar:

        def measured(point: TrainedModel) -> dict[str, Any]:
            model = point.load()
            metrics = {"scores": studied.scores(model), "perplexity": studied.perplexities(model)}
            bar.advance(point.name)
            return {"name": point.name, "step": point.step, **metrics}

        matrix = [measured(point) for point in points]
        along = {name: [measured(point) for point in kept] for name, kept in checkpoints.items()}
    sequence = matrix[: 1 + len(studied.axes)]
    all_scored = studied.scored_axes == studied.axes
    return {
        "axes": studied.axes,
        "measure": "scores" if all_scored else "perplexity",
        "held_out": {axis: len(studied.data.held_out[axis]) for axis in studied.axes},
        "stages": matrix,
        "along": along,
        "ends": [seen["step"] for seen in sequence],
        "forgetting": {axis: forgetting([seen["scores"][axis] for seen in sequence]) for axis in studied.scored_axes},
    }


def forgetting(scores: list[float]) -> float:
    """The best score before the last stage, minus the score after it; negative for an axis that gained.

    Chaudhry et al., Riemannian Walk for Incremental Learning (ECCV 2018), §2.
    """
    return max(scores[:-1]) - scores[-1]


def stages(studied: StudiedRun) -> list[TrainedModel]:
    """The base model, the sequences after each axis, the restored and the mixed fine-tune, and the aligned model."""
    points = [TrainedModel(BASE, 0, studied.base_model)]
    for name in sequences(studied.config):
        step, is_plain = 0, name == SEQUENTIAL
        for axis, job in _sequence(studied, name):
            step += _steps(studied, job)
            label = f"after {axis}" if is_plain else f"regularised, after {axis}"
            if is_plain or axis != studied.axes[0]:  # both start from the first axis's specialist
                points.append(TrainedModel(label, step, partial(studied.fine_tuned, job)))
    if RESTORED in studied.config.baselines.make:
        place = studied.run.out.baselines / RESTORED
        points.append(TrainedModel(RESTORED, 0, lambda: load_specialist(studied.base, place).eval()))
    mixed = mixed_name(studied.axes)
    points.append(TrainedModel(MIXED, _steps(studied, mixed), partial(studied.fine_tuned, mixed)))
    return [*points, TrainedModel(ALIGNED, 0, studied.aligned)]


def _sequence(studied: StudiedRun, name: str = SEQUENTIAL) -> list[tuple[str, str]]:
    """(axis, directory of the fine-tune) in the order of training."""
    return [(axis, sequential_name(studied.axes[: count + 1], name)) for count, axis in enumerate(studied.axes)]


def _steps(studied: StudiedRun, job: str) -> int:
    return len(manifest.read(studied.run.out.specialists / job)["losses"])


def _checkpoints(studied: StudiedRun, name: str) -> list[TrainedModel]:
    """The base model and every checkpoint of the sequence, or of the mixed fine-tune; empty without checkpoints."""
    jobs = [(MIXED, mixed_name(studied.axes))] if name == MIXED else _sequence(studied)
    points, start = [], 0
    for axis, job in jobs:
        for path in kept_checkpoints(studied, job):
            step = start + int(path.name.removeprefix(PREFIX))
            points.append(TrainedModel(axis, step, partial(restored, studied, path)))
        start += _steps(studied, job)
    return [TrainedModel(BASE, 0, studied.base_model), *points] if points else []


def kept_checkpoints(studied: StudiedRun, job: str) -> list[Path]:
    """The fine-tune's own checkpoints, oldest first; those of another one are left out. Raises DataError for damage."""
    own, found = studied.fingerprints[job], []
    for path in sorted((studied.run.out.checkpoints / "stage1" / job).glob(f"{PREFIX}*")):
        content = manifest.read(path)
        if content["fingerprint"] != own:
            continue
        manifest.read_verified(path)
        found.append(path)
    return found


def restored(studied: StudiedRun, checkpoint: Path) -> PreTrainedModel:
    """The base model with the trained weights replaced by the checkpoint's, which are fp32."""
    weights: dict[str, Tensor] = {}
    for path in sorted(checkpoint.glob("rank*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [key for key in file.keys() if key.startswith(f"{WEIGHT}/")]  # noqa: SIM118 - a safetensors file, not a dict
            weights |= {key.removeprefix(f"{WEIGHT}/"): file.get_tensor(key) for key in names}
    model = studied.base_model()
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    assert weights and not unexpected, f"{checkpoint} is a checkpoint of another model: {unexpected[:3]}"
    return model


def show(content: dict[str, Any]) -> None:
    columns = ["model", *content["axes"]]
    for key, title, digits in (
        ("scores", "Score on held-out rows", 1),
        ("perplexity", "Perplexity of held-out answers", 2),
    ):
        rows = [
            [seen["name"], *(f"{seen[key][axis]:.{digits}f}" if axis in seen[key] else "–" for axis in content["axes"])]
            for seen in content["stages"]
        ]
        if any(seen[key] for seen in content["stages"]):
            console.table(title, columns, rows)
    for axis, lost in content["forgetting"].items():
        console.say(f"{axis}: forgetting {lost:.1f} points (best score before the last stage minus the score after it)")


def draw(content: dict[str, Any]) -> Figure:
    """Scores and perplexities after each stage; below, the scores (or perplexities) at every checkpoint."""
    along = {name: seen for name, seen in content["along"].items() if seen}
    key = content["measure"]
    with plotting.styled():
        figure = plotting.figure(11.0, 2.6 + 1.9 * len(along))
        top, *below = plotting.stacked(figure, [2.5, *[1.9] * len(along)])
        both = ["scores", "perplexity"] if content["forgetting"] else ["perplexity"]
        for plot, what in zip(top.subplots(1, len(both), squeeze=False)[0], both, strict=True):
            _matrix(plot, content, what)
        for part, (name, seen) in zip(below, along.items(), strict=True):
            plot = part.subplots()
            _strip(plot, seen, content, key)
            plot.set_title(f"{name} fine-tuning, {LABELS[key]}", pad=18 if name == "sequential" else 6)
        return figure


def _values(seen: list[dict[str, Any]], axes: list[str], key: str) -> NDArray[np.float64]:
    """[axes, models]"""
    return np.array([[model[key].get(axis, np.nan) for model in seen] for axis in axes])


def _matrix(plot: Any, content: dict[str, Any], key: str) -> None:
    axes, seen = content["axes"], content["stages"]
    values = _values(seen, axes, key)
    _picture(plot, values, key, axes, [model["name"].replace(" ", "\n") for model in seen])
    plot.axvline(len(axes) + 0.5, color="white", linewidth=5)  # the columns after it are not stages of the sequence
    plot.set_title(LABELS[key])


def _picture(plot: Any, values: NDArray[np.float64], key: str, rows: list[str], columns: list[str]) -> None:
    """Darker is better. Scores are shaded by their value, perplexities by their ratio to the lowest in their row."""
    if key == "scores":
        plotting.heat(plot, values, rows, columns, span=(0, 100))
        return
    above = -np.log(values / np.nanmin(values, axis=1, keepdims=True))
    texts = [[f"{v:.2f}" if v < 10 else f"{v:.0f}" for v in row] for row in values]
    plotting.heat(plot, above, rows, columns, texts=texts, span=(min(-1.0, float(np.nanmin(above))), 0.0))


def _strip(plot: Any, seen: list[dict[str, Any]], content: dict[str, Any], key: str) -> None:
    axes = content["axes"]
    _picture(plot, _values(seen, axes, key), key, axes, [str(model["step"]) for model in seen])
    plot.set_xlabel("optimizer step")
    names = [model["name"] for model in seen]
    for place in range(2, len(names)):
        if names[place] != names[place - 1]:  # the next axis's fine-tune begins here
            plot.axvline(place - 0.5, color="#D55E00", linewidth=1.6)
    for axis in dict.fromkeys(names[1:]):
        if axis in axes:
            own = [place for place, name in enumerate(names) if name == axis]
            plot.text(np.mean(own), -0.62, f"training on {axis}", ha="center", va="bottom", fontsize=8, color="#D55E00")
