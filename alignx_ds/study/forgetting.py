"""Figure 1b: what is left of each axis as sequential fine-tuning goes on, beside fine-tuning on the mixture.

Stages are what the run's fine-tunes ended in. Where the run kept its checkpoints (`checkpoints.finished=true`, and
`checkpoints.keep` large enough), every one of them is a step in between.
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

from alignx_ds.errors import DataError
from alignx_ds.runs import manifest
from alignx_ds.runtime import console
from alignx_ds.stages.finetune import MIXED, sequential_name
from alignx_ds.study import drawing
from alignx_ds.study.subject import Subject
from alignx_ds.training.checkpoints import PREFIX
from alignx_ds.training.state import WEIGHT

BASE, ALIGNED = "base", "AlignX"


@dataclass(frozen=True)
class Point:
    """A model that training passed through: in which fine-tune, and after how many optimizer steps since the base."""

    name: str
    step: int
    build: Callable[[], PreTrainedModel]


def measure(subject: Subject) -> dict[str, Any]:
    """Perplexity and, where the judge costs nothing, score of every axis: after each stage, and at every checkpoint."""
    stages, fine = _stages(subject), {name: _along(subject, name) for name in ("sequential", "mixed")}
    total = len(stages) + sum(map(len, fine.values()))
    with console.progress("models looked at", total) as bar:

        def look(point: Point) -> dict[str, Any]:
            model = point.build()
            seen = {"scores": subject.scores(model), "perplexity": subject.perplexities(model)}
            bar.advance(point.name)
            return {"name": point.name, "step": point.step, **seen}

        matrix = [look(point) for point in stages]
        along = {name: [look(point) for point in points] for name, points in fine.items()}
    sequence = [seen for seen in matrix if seen["name"] not in (MIXED, ALIGNED)]
    judged = subject.judged() == subject.axes
    return {
        "axes": subject.axes,
        "measure": "scores" if judged else "perplexity",
        "held_out": {axis: len(subject.data.held_out[axis]) for axis in subject.axes},
        "stages": matrix,
        "along": along,
        "ends": [seen["step"] for seen in sequence],
        "forgetting": {axis: forgetting([seen["scores"][axis] for seen in sequence]) for axis in subject.judged()},
    }


def forgetting(scores: list[float]) -> float:
    """The best score before the last stage, less the last: what was there and is lost; below zero: gained.

    Chaudhry et al., Riemannian Walk for Incremental Learning (ECCV 2018), §2.
    """
    return max(scores[:-1]) - scores[-1]


def _stages(subject: Subject) -> list[Point]:
    """The base model, the sequence after each axis, the mixture, and the aligned model."""
    points, step = [Point(BASE, 0, subject.backbone)], 0
    for axis, job in _sequence(subject):
        step += _steps(subject, job)
        points.append(Point(f"after {axis}", step, partial(subject.fine_tuned, job)))
    points.append(Point(MIXED, _steps(subject, MIXED), partial(subject.fine_tuned, MIXED)))
    return [*points, Point(ALIGNED, 0, subject.aligned)]


def _sequence(subject: Subject) -> list[tuple[str, str]]:
    """(axis, directory of the fine-tune) in the order of training."""
    return [(axis, sequential_name(subject.axes[: count + 1])) for count, axis in enumerate(subject.axes)]


def _steps(subject: Subject, job: str) -> int:
    return len(manifest.read(subject.out.specialists / job)["losses"])


def _along(subject: Subject, name: str) -> list[Point]:
    """The base model and every kept checkpoint of the sequence, or of the mixture; nothing when none was kept."""
    jobs = [(MIXED, MIXED)] if name == "mixed" else _sequence(subject)
    points, start = [], 0
    for axis, job in jobs:
        for path in kept_checkpoints(subject, job):
            step = start + int(path.name.removeprefix(PREFIX))
            points.append(Point(axis, step, partial(restored, subject, path)))
        start += _steps(subject, job)
    return [Point(BASE, 0, subject.backbone), *points] if points else []


def kept_checkpoints(subject: Subject, job: str) -> list[Path]:
    """Those that the fine-tune of this name passed through, oldest first; another's, or damaged ones, are refused."""
    own = manifest.read(subject.out.specialists / job)["fingerprint"]
    found = []
    for path in sorted((subject.out.checkpoints / "stage1" / job).glob(f"{PREFIX}*")):
        content = manifest.read(path)
        if content["fingerprint"] != own:
            continue
        for name, expected in content["files"].items():
            if problem := manifest.damage(path, name, expected):
                raise DataError(f"{problem}; remove the checkpoint to go on without it")
        found.append(path)
    return found


def restored(subject: Subject, checkpoint: Path) -> PreTrainedModel:
    """The base model with a checkpoint's fp32 weights in place of those that were trained."""
    weights: dict[str, Tensor] = {}
    for path in sorted(checkpoint.glob("rank*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [key for key in file.keys() if key.startswith(f"{WEIGHT}/")]  # noqa: SIM118 - it is no dict
            weights |= {key.removeprefix(f"{WEIGHT}/"): file.get_tensor(key) for key in names}
    model = subject.backbone()
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    assert weights and not unexpected, f"{checkpoint} is not of this model: {unexpected[:3]}"
    return model


def show(content: dict[str, Any]) -> None:
    columns = ["after", *content["axes"]]
    for key, title, digits in (("scores", "Score on held-out rows", 1), ("perplexity", "Perplexity", 2)):
        rows = [
            [seen["name"], *(f"{seen[key][axis]:.{digits}f}" if axis in seen[key] else "–" for axis in content["axes"])]
            for seen in content["stages"]
        ]
        if any(seen[key] for seen in content["stages"]):
            console.table(title, columns, rows)
    for axis, lost in content["forgetting"].items():
        console.say(f"{axis}: the sequence forgets {lost:.1f} points")


def draw(content: dict[str, Any]) -> Figure:
    """The matrix of scores and that of perplexities; below, the same along the steps where checkpoints were kept."""
    along = {name: seen for name, seen in content["along"].items() if seen}
    key = content["measure"]
    with drawing.styled():
        figure = drawing.figure(11.0, 2.6 + 1.9 * len(along))
        top, *below = drawing.stacked(figure, [2.5, *[1.9] * len(along)])
        both = ["scores", "perplexity"] if content["forgetting"] else ["perplexity"]
        for plot, what in zip(top.subplots(1, len(both), squeeze=False)[0], both, strict=True):
            _matrix(plot, content, what)
        for part, (name, seen) in zip(below, along.items(), strict=True):
            plot = part.subplots()
            _strip(plot, seen, content, key)
            plot.set_title(f"{name} fine-tuning, step by step", pad=18 if name == "sequential" else 6)
        return figure


def _values(seen: list[dict[str, Any]], axes: list[str], key: str) -> NDArray[np.float64]:
    """[axes, models]"""
    return np.array([[model[key].get(axis, np.nan) for model in seen] for axis in axes])


def _matrix(plot: Any, content: dict[str, Any], key: str) -> None:
    axes, seen = content["axes"], content["stages"]
    values = _values(seen, axes, key)
    _picture(plot, values, key, axes, [model["name"].replace(" ", "\n") for model in seen])
    plot.axvline(len(axes) + 0.5, color="white", linewidth=5)  # what follows is no stage of the sequence
    plot.set_title({"scores": "score on held-out rows", "perplexity": "perplexity of held-out answers"}[key])


def _picture(plot: Any, values: NDArray[np.float64], key: str, rows: list[str], columns: list[str]) -> None:
    """Dark is good: scores by themselves, perplexities by how far they are above the lowest of their row."""
    if key == "scores":
        drawing.heat(plot, values, rows, columns, span=(0, 100))
        return
    above = -np.log(values / np.nanmin(values, axis=1, keepdims=True))
    texts = [[f"{v:.2f}" if v < 10 else f"{v:.0f}" for v in row] for row in values]
    drawing.heat(plot, above, rows, columns, texts=texts, span=(min(-1.0, float(np.nanmin(above))), 0.0))


def _strip(plot: Any, seen: list[dict[str, Any]], content: dict[str, Any], key: str) -> None:
    axes = content["axes"]
    _picture(plot, _values(seen, axes, key), key, axes, [str(model["step"]) for model in seen])
    plot.set_xlabel("optimizer step")
    names = [model["name"] for model in seen]
    for place in range(2, len(names)):
        if names[place] != names[place - 1]:  # here the next axis's fine-tune begins
            plot.axvline(place - 0.5, color="#D55E00", linewidth=1.6)
    for axis in dict.fromkeys(names[1:]):
        if axis in axes:
            own = [place for place, name in enumerate(names) if name == axis]
            plot.text(np.mean(own), -0.62, f"training on {axis}", ha="center", va="bottom", fontsize=8, color="#D55E00")
