"""The run's result as `report.json`, as a self-contained `report.html`, and as the table on the terminal."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml

from alignx_ds import console, distributed, manifest
from alignx_ds.config import RunConfig, to_dict
from alignx_ds.evaluation import plots
from alignx_ds.evaluation.router import RouterReport
from alignx_ds.evaluation.systems import Judged
from alignx_ds.outputs import Outputs
from alignx_ds.specialists.finetune import Workshop

PACKAGES = ("torch", "deepspeed", "transformers", "scikit-learn")
Losses = dict[str, list[float]]


@dataclass(frozen=True)
class Report:
    content: dict[str, Any]  # what report.json holds
    losses: Losses
    judged: dict[str, Judged]


def build(
    config: RunConfig, shop: Workshop, judged: dict[str, Judged], router: RouterReport, out: Outputs, seconds: float
) -> Report:
    axes = list(config.axes)
    stage1 = {p.parent.name: manifest.read(p.parent) for p in sorted(out.specialists.glob(f"*/{manifest.NAME}"))}
    losses = {name: m["losses"] for name, m in stage1.items()} | {"alignx": manifest.read(out.model)["losses"]}
    content = {
        "run": _circumstances(seconds) | {"seed": config.seed, "held_out_rows": config.data.held_out_rows},
        "systems": {name: _scores(j, axes) for name, j in judged.items()},
        "router": {**router.figures, **{k: v for k, v in asdict(router).items() if k != "figures"}},
        "experts": config.expert_names,
        "collapse": {axis: _collapse(judged, axis) for axis in axes},
        "specialists": {axis: stage1[axis]["layers"] for axis in axes},
        "config": to_dict(config),
    }
    return Report(content, losses, judged)


def _scores(judged: Judged, axes: list[str]) -> dict[str, Any]:
    """Per axis 0–100, higher is better; avg is their mean, which is (WR + TI − SS)/3 of the paper plus 100/3."""
    scores: dict[str, Any] = {axis: judged.figures[axis]["score"] for axis in axes}
    scores["avg"] = sum(scores.values()) / len(axes)
    for figures in judged.figures.values():
        if "benign_served" in figures:
            scores["benign_served"] = figures["benign_served"]
    return scores | {"details": judged.figures}


def _collapse(judged: dict[str, Judged], axis: str) -> dict[str, float]:
    """What an axis's own specialist reaches, and how many points later fine-tunes of the sequence took from it."""
    own, after = (judged[name].figures[axis]["score"] for name in (axis, "sequential"))
    aligned = judged["alignx"].figures[axis]["score"]
    return {"specialist": own, "sequential_loses": own - after, "alignx_keeps": aligned / own if own else 0.0}


def _circumstances(seconds: float) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "ranks": distributed.world_size(),
        "hardware": gpu or f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def write(report: Report, out: Outputs) -> None:
    """report.json, report.html and the pictures on their own. Model output is escaped (autoescape)."""
    manifest.write_text(out.root / "report.json", json.dumps(report.content, indent=2) + "\n")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    content = report.content
    axes = list(content["collapse"])
    pictures = {
        "scores": plots.scores(content["systems"], axes),
        "confusion": plots.confusion(content["router"]["confusion"], content["experts"]),
        "losses": plots.losses(report.losses),
    }
    for name, svg in pictures.items():
        manifest.write_text(out.root / "plots" / f"{name}.svg", svg)
    page = environment.get_template("report.html.j2").render(
        report=content,
        axes=axes,
        pictures=pictures,
        samples=_samples(report, axes),
        settings=yaml.safe_dump(content["config"], sort_keys=False),
    )
    manifest.write_text(out.root / "report.html", page)


def _samples(report: Report, axes: list[str]) -> list[dict[str, Any]]:
    """For a few held-out prompts of each axis, every system's answer."""
    shown = []
    for axis in axes:
        for number, (row, _) in enumerate(report.judged["base"].samples[axis]):
            said = {name: j.samples[axis][number][1] for name, j in report.judged.items()}
            shown.append({"axis": axis, "prompt": row.prompt, "reference": row.response, "answers": said})
    return shown


def show(report: Report, out: Outputs) -> None:
    """The table and the report's path, on the terminal."""
    content = report.content
    axes = list(content["collapse"])
    extra = ["benign_served"] if any("benign_served" in s for s in content["systems"].values()) else []
    columns = [*axes, "avg", *extra]
    rows = [[name, *(f"{s[c]:.1f}" for c in columns)] for name, s in content["systems"].items()]
    console.table(
        "Held-out rows, no hint of the axis in the prompt (0–100, higher is better)", ["system", *columns], rows
    )
    r = content["router"]
    console.say(
        f"router: accuracy {r['accuracy']:.3f}, ECE {r['ece']:.3f} (before temperature "
        f"{r['uncalibrated']['ece']:.3f}), Brier {r['brier']:.3f}"
    )
    console.say(f"{content['run']['seconds']:.0f} s; report: {out.root / 'report.html'} and {out.root / 'report.json'}")
