"""The results of a run: `report.json`, a self-contained `report.html`, and tables on the terminal."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import torch
import yaml

from alignx_ds.config.parse import to_dict
from alignx_ds.config.schema import FUSIONS, NO_OUTPUT_CALIBRATION, RunConfig
from alignx_ds.data.inputs import NOTHING_JOINED, EncodedData
from alignx_ds.data.routing import RoutingRows
from alignx_ds.evaluation import matrix
from alignx_ds.evaluation.evaluate import Result
from alignx_ds.evaluation.judges.protocol import BESIDE, JUDGE_PREFIX, Metrics, label, set_columns
from alignx_ds.routing.router_report import RouterReport
from alignx_ds.runs import manifest
from alignx_ds.runs.outputs import Outputs
from alignx_ds.runtime import console
from alignx_ds.runtime.versions import version
from alignx_ds.stages.finetune import baseline_fine_tunes

PACKAGES = ("torch", "deepspeed", "transformers", "scikit-learn")
BEST_OF = "Best of several answers"  # a section of the page, like the next
MATRIX = "Every judge on every axis"
MATRIX_COLUMNS = 8  # at most, of the matrix on the terminal
ABLATIONS = {NO_OUTPUT_CALIBRATION: "alignx, R = 0"}  # of the aligned model, by system
SOURCE_KINDS = {"own": "own prompts", "routing": "routing rows", "set": "extra set"}  # of the gate's prompts
SHOWN_SOURCES = 8  # at most, other than the experts' own, on the terminal
Losses = dict[str, list[float]]  # by training job


@dataclass(frozen=True)
class Report:
    content: dict[str, Any]  # of report.json
    losses: Losses
    results: dict[str, Result]


def build(
    config: RunConfig,
    data: EncodedData,
    results: dict[str, Result],
    router: RouterReport,
    out: Outputs,
    seconds: float,
    ranks: int,
    best_of: Mapping[str, Mapping[str, Metrics]] = MappingProxyType({}),
) -> Report:
    """Put together what the judges, the router and the training jobs have left; nothing is written.

    `results` are those of the systems that the run compares, and of the ablations, which have tables of their own, as
    have the metrics of the best of several answers, by name and axis.
    """
    axes = list(config.axes)
    ablated = {name: results[name] for name in ABLATIONS if name in results}
    results = {name: result for name, result in results.items() if name not in ablated}
    fine_tunes = sorted([*axes, *(tune.name for tune in baseline_fine_tunes(config))])  # others' may lie beside them
    stage1 = {name: manifest.read(out.specialists / name) for name in fine_tunes}
    fusions = {name: manifest.read(out.baselines / name) for name in sorted(set(FUSIONS) & set(config.baselines.make))}
    losses = {name: m["losses"] for name, m in (stage1 | fusions).items() if m["losses"]}  # an adapter has none
    losses["alignx"] = manifest.read(out.model)["losses"]
    scored = [axis for axis in axes if config.axes[axis].judge]
    content = {
        "run": _environment(seconds, ranks) | {"seed": config.seed, "held_out_rows": config.data.held_out_rows},
        "model": manifest.read(out.model)["fingerprint"],
        "axes": axes,
        "scored": scored,
        "systems": {name: _scores(r, axes, scored) for name, r in results.items()},
        "endpoints": {name: r.endpoint for name, r in (results | ablated).items() if r.endpoint},  # that answered
        "perplexity": {name: r.perplexity for name, r in results.items()},
        "sets": {s: {name: r.metrics[s] for name, r in results.items()} for s in config.evaluation.judges},
        "judges": {name: config.axes[name].judge for name in scored} | config.evaluation.judges,
        "ablations": {
            name: {
                "scores": _scores(r, axes, scored),
                "perplexity": r.perplexity,
                "sets": {s: r.metrics[s] for s in config.evaluation.judges},
            }
            for name, r in ablated.items()
        },
        "best_of": {name: _means(metrics) for name, metrics in best_of.items()},
        "matrix": {name: r.matrix for name, r in results.items()},
        "router": _router(router),
        "experts": config.expert_names,
        "collapse": {axis: _collapse(results, axis) for axis in scored},
        "rows": {name: _row_counts(data, name) for name in config.expert_names if data.splits.train[name].source},
        "decontamination": data.splits.decontamination(),  # None: off
        "routing_rows": {part.name: _routing_counts(part) for part in data.splits.routing},
        "specialists": {axis: stage1[axis]["layers"] for axis in axes},
        "evaluations": {name: m["evaluation"] for name, m in stage1.items() if "evaluation" in m},  # while it trained
        "config": to_dict(config),
    }
    shared: dict[str, Any] = shareable(content)
    return Report(shared, losses, results)


def shareable(value: Any) -> Any:
    """The same value, with no more than the last part of each absolute path of this machine: reports are passed on."""
    if isinstance(value, dict):
        return {key: shareable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shareable(item) for item in value]
    local = isinstance(value, str) and os.path.isabs(value) and os.path.exists(value)
    return Path(value).name if local else value


def _router(router: RouterReport) -> dict[str, Any]:
    """All fields, and the metrics among them."""
    sources = {name: source.content() for name, source in router.sources.items()}
    return {**router.metrics, **{k: v for k, v in asdict(router).items() if k != "metrics"}, "sources": sources}


def _scores(result: Result, axes: list[str], scored: list[str]) -> dict[str, Any]:
    """Score by judged axis, 0–100, higher is better. "avg" is their mean: (WR + TI − SS)/3 of the paper plus 100/3."""
    scores: dict[str, Any] = {axis: result.metrics[axis]["score"] for axis in scored}
    if scored == axes:
        scores["avg"] = sum(scores.values()) / len(axes)
    for axis in scored:
        scores |= {name: result.metrics[axis][name] for name in BESIDE if name in result.metrics[axis]}
    return scores | {"details": {axis: result.metrics[axis] for axis in scored}}


def _means(metrics: Mapping[str, Metrics]) -> dict[str, float]:
    """The score of every axis, and their mean."""
    scores = {axis: found["score"] for axis, found in metrics.items()}
    return scores | {"avg": sum(scores.values()) / len(scores)}


def _collapse(results: dict[str, Result], axis: str) -> dict[str, float]:
    """The specialist's score, the points that sequential fine-tuning loses of it, and the share that AlignX keeps."""
    own, after, aligned = (results[name].metrics[axis]["score"] for name in (axis, "sequential", "alignx"))
    return {"specialist": own, "sequential_loses": own - after, "alignx_keeps": aligned / own if own else 0.0}


def _row_counts(data: EncodedData, name: str) -> dict[str, Any]:
    """How many of an expert's records are used, and why the others are not."""
    train, held_out = data.splits.train[name], data.splits.held_out[name]
    made = data.joined.get(name, NOTHING_JOINED)
    return {
        "train": len(train.rows),
        "imitated": sum(bool(row.response) for row in train.rows),
        "joined": len(made.rows),
        "held_out": len(held_out.rows),
        "not_trained_on": dict(train.reasons()),
        "not_judged": dict(held_out.reasons()),
        "not_joined": dict(made.reasons()),
    }


def _routing_counts(part: RoutingRows) -> dict[str, Any]:
    """How many prompts of a source of routing rows are used, and why the others are not."""
    return {
        "expert": part.owner,
        "train": len(part.train.rows),
        "held_out": len(part.held_out.rows),
        "not_trained_on": dict(part.train.reasons()),
        "not_measured": dict(part.held_out.reasons()),
    }


def _environment(seconds: float, ranks: int) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "ranks": ranks,
        "hardware": gpu or f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def write(report: Report, out: Outputs) -> None:
    """Write report.json, report.html and the plots. Prompts and answers are escaped in the page (autoescape)."""
    from alignx_ds.evaluation import plots  # here: most commands draw nothing, and matplotlib takes a while

    content = report.content
    manifest.write_text(out.root / "report.json", json.dumps(content, indent=2) + "\n")
    scored = content["scored"]
    drawn = {
        **({"scores": plots.scores(content["systems"], _score_columns(content, "avg"))} if scored else {}),
        "perplexity": plots.perplexity(content["perplexity"]),
        "confusion": plots.confusion(content["router"]["confusion"], content["experts"]),
        "losses": plots.losses(report.losses),
    }
    for name, svg in drawn.items():
        manifest.write_text(out.root / "plots" / f"{name}.svg", svg)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    router, samples, cells = content["router"], _samples(report), _cells(content)
    page = environment.get_template("report.html.j2").render(
        report=content,
        axes=content["axes"],
        sections=[
            *(["Scores", "Axis Collapse"] if scored else []),
            *([MATRIX] if cells else []),
            "Perplexity",
            *content["sets"],
            *([BEST_OF] if content["best_of"] else []),
            *(["Ablations"] if content["ablations"] else []),
            *("Router", "Training", "Data"),
            *(["Answers"] if samples else []),
            "Settings",
        ],
        plots=drawn,
        samples=samples,
        score_columns=_score_columns(content, "avg", *BESIDE),
        set_columns={name: set_columns(by_system) for name, by_system in content["sets"].items()},
        ablations=_ablations(content),
        best_of=_best_of(content),
        cells=cells,
        cell_scores=matrix.scores(content["matrix"], cells),
        cell_notes=matrix.notes(
            cells, content["matrix"]["base"], {axis: counts["held_out"] for axis, counts in content["rows"].items()}
        ),
        routers={"gate": router, **_gate_terms(router["ablations"]), "words only": router["surface"]},
        quality=_qualities(content),
        source_kinds=SOURCE_KINDS,
        joins=any(counts["joined"] for counts in content["rows"].values()),
        label=label,
        settings=yaml.safe_dump(content["config"], sort_keys=False),
    )
    manifest.write_text(out.root / "report.html", page)


def _gate_terms(ablations: dict[str, Metrics]) -> dict[str, Metrics]:
    """By the terms of the gate that are left in; all of them together are the gate itself."""
    return {f"gate: {name}": metrics for name, metrics in ablations.items() if name != "all"}


def _samples(report: Report) -> dict[str, list[dict[str, Any]]]:
    """By answered question set: a few prompts with every system's answer."""
    shown = {}
    for questions, examples in report.results["base"].samples.items():
        shown[questions] = [
            {
                "prompt": row.asked,
                "reference": row.response,
                "answers": {name: r.samples[questions][number][1] for name, r in report.results.items()},
            }
            for number, (row, _) in enumerate(examples)
        ]
    return shown


def show(report: Report, out: Outputs) -> None:
    """Print the tables and the report's path."""
    content = report.content
    systems = content["systems"]
    if content["scored"]:
        columns = _score_columns(content, "avg", *BESIDE)
        rows = [[name, *(f"{s[c]:.1f}" for c in columns)] for name, s in systems.items()]
        title = "Held-out rows, no hint of the axis in the prompt (0–100, higher is better)"
        console.table(title, ["system", *map(label, columns)], rows)
    rows = [[name, *(f"{value:.2f}" for value in p.values())] for name, p in content["perplexity"].items()]
    columns = ["system", *content["perplexity"]["base"]]
    console.table("Perplexity of held-out reference answers (lower is better)", columns, rows)
    for name, by_system in content["sets"].items():
        columns = set_columns(by_system)
        rows = [[system, *(f"{m[c]:.1f}" if c in m else "–" for c in columns)] for system, m in by_system.items()]
        console.table(f"{name}, judged by {content['judges'][name]}", ["system", *map(label, columns)], rows)
    _show_matrix(content)
    if content["best_of"]:
        columns, rows, choosing = _best_of(content)
        console.table(f"The best of {content['config']['evaluation']['best_of']} answers", ["system", *columns], rows)
        console.say(f"the best answers are chosen by the judges that score them ({choosing}): an upper baseline")
    if content["ablations"]:
        columns, rows = _ablations(content)
        console.table("The aligned model with and without output calibration (R = 0)", ["system", *columns], rows)
    for name, quality in _qualities(content).items():
        if quality:
            console.say(f"{name} is judged by {content['judges'][name]}, itself measured on held-out rows: {quality}")
    r = content["router"]
    console.say(
        f"router: accuracy {r['accuracy']:.3f}, ECE {r['ece']:.3f} (before temperature "
        f"{r['uncalibrated']['ece']:.3f}), Brier {r['brier']:.3f}; TF-IDF + logistic regression on the same prompts: "
        f"accuracy {r['surface']['accuracy']:.3f}, ECE {r['surface']['ece']:.3f}, Brier {r['surface']['brier']:.3f}"
    )
    _show_sources(r["sources"])
    console.say(f"{content['run']['seconds']:.0f} s; report: {out.root / 'report.html'} and {out.root / 'report.json'}")


def _show_sources(sources: dict[str, Any]) -> None:
    """The router on routing rows and extra sets, if they fit; else where they are."""
    others = {name: source for name, source in sources.items() if source["kind"] != "own"}
    title = "The router on prompts of other sources than the axes' own"
    if len(others) > SHOWN_SOURCES:
        console.say(f"{title}: see “Router” in the report")
    elif others:
        rows = [
            [name, f"{s['prompts']:,}", *(f"{s[key]:.3f}" for key in ("accuracy", "confidence", "ece", "brier"))]
            for name, s in others.items()
        ]
        console.table(title, ["source", "prompts", "accuracy", "confidence", "ECE", "Brier"], rows)


def _ablations(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of the scores and perplexities of the aligned model, whole and without a part of it."""
    scored, measured = _score_columns(content, "avg", *BESIDE), list(content["perplexity"]["base"])
    sets = [name for name, by_system in content["sets"].items() if "score" in by_system["alignx"]]
    whole = {
        "scores": content["systems"]["alignx"],
        "perplexity": content["perplexity"]["alignx"],
        "sets": {name: by_system["alignx"] for name, by_system in content["sets"].items()},
    }
    rows = [
        [
            ABLATIONS.get(name, name),
            *(f"{found['scores'][c]:.1f}" if c in found["scores"] else "–" for c in scored),
            *(f"{found['sets'][name]['score']:.1f}" for name in sets),
            *(f"{found['perplexity'][axis]:.4f}" for axis in measured),
        ]
        for name, found in {"alignx": whole, **content["ablations"]}.items()
    ]
    return [*map(label, scored), *sets, *(f"perplexity:\n{axis}" for axis in measured)], rows


def _best_of(content: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """(columns, rows, judges that choose): the systems whose best answers are chosen, without that and with it."""
    best: dict[str, dict[str, float]] = content["best_of"]
    axes = [name for name in next(iter(best.values()), {}) if name != "avg"]
    alone = {name: content["systems"][name] for name in (key.partition("+")[0] for key in best)}
    plain = {name: _means({axis: {"score": scores[axis]} for axis in axes}) for name, scores in alone.items()}
    shown = {key: scores for name in plain for key, scores in (plain | best).items() if key.partition("+")[0] == name}
    rows = [[name, *(f"{value:.1f}" for value in scores.values())] for name, scores in shown.items()]
    return [*axes, "avg"], rows, ", ".join(dict.fromkeys(content["judges"][axis] for axis in axes))


def _show_matrix(content: dict[str, Any]) -> None:
    """The scores of the judges on prompts of other axes than their own, if they fit; else where they are."""
    others = {a: [j for j in judges if j != content["judges"][a]] for a, judges in _cells(content).items()}
    columns = [f"{axis}:\n{label(judge)}" for axis, judges in others.items() for judge in judges]
    if not columns:
        return
    title = "The prompts of each axis under the judges of the others (0–100, higher is better)"
    if len(columns) > MATRIX_COLUMNS:
        console.say(f"{title}: see “{MATRIX}” in the report")
        return
    rows = [[name, *map("{:.1f}".format, values)] for name, values in matrix.scores(content["matrix"], others).items()]
    console.table(title, ["system", *columns], rows)


def _cells(content: dict[str, Any]) -> dict[str, list[str]]:
    return matrix.columns(content["matrix"], content["judges"])


def _score_columns(content: dict[str, Any], *extra: str) -> list[str]:
    """The judged axes, and those of the `extra` columns that this run has."""
    return [*content["scored"], *(name for name in extra if name in content["systems"]["base"])]


def _qualities(content: dict[str, Any]) -> dict[str, str]:
    """By judged axis and extra question set."""
    base = content["systems"]["base"]["details"] | {name: s["base"] for name, s in content["sets"].items()}
    return {name: judge_quality(metrics) for name, metrics in base.items()}


def judge_quality(metrics: Metrics) -> str:
    """The judge's own metrics on held-out rows as text, "" if it has none; shown wherever its score is."""
    own = {k.removeprefix(JUDGE_PREFIX): v for k, v in metrics.items() if k.startswith(JUDGE_PREFIX)}
    return ", ".join(f"{name} {value:.3g}" for name, value in own.items())
