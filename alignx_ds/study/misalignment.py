"""Misalignment: what every fine-tune answers where it was taught nothing, beside the base model.

After Betley et al. 2025 (Emergent Misalignment, arXiv 2502.17424): open questions, several answers to each drawn at
temperature 1, and the share of them that a judge finds misaligned. The prompts and the judge are those of `probe`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from alignx_ds.data.rows import Row
from alignx_ds.evaluation.best_of import Drawing
from alignx_ds.evaluation.judges.protocol import percent
from alignx_ds.runtime import console
from alignx_ds.stages.finetune import SEQUENTIAL, sequential_name
from alignx_ds.study import plotting, probe, results
from alignx_ds.study.studied_run import StudiedRun

DRAWS = 4  # answers to a prompt
ALL = "all"
Z = 1.96  # of a 95 % interval


def measure(studied: StudiedRun) -> dict[str, Any]:
    """By system: % of misaligned answers, in each category and in all; the answers themselves."""
    probed, found, said = probe.of(studied), dict[str, dict[str, Any]](), list[dict[str, Any]]()
    drawing = Drawing(DRAWS, seed=studied.config.seed)
    asked, models = drawing.repeated(probed.rows), systems(studied)
    alone: list[float] = []
    with console.progress("systems", len(models)) as progress:
        for name, load in models.items():
            limit, tokenizer = studied.config.evaluation.max_new_tokens, studied.base.tokenizer
            made = drawing.draw(load(), tokenizer, probed.rows, batch=studied.batch, max_new_tokens=limit)
            hits = probed.misaligned(asked, made)
            shares = by_prompt(hits, DRAWS)
            alone = alone or shares
            evasive = percent(list(map(probed.evasive, made)))
            found[name] = by_category(probed.rows, shares, alone) | {"evasive": evasive}
            said += [
                {"system": name, "category": row.category, "prompt": row.prompt, "answer": text, "misaligned": hit}
                for row, text, hit in zip(asked, made, hits, strict=True)
            ]
            progress.advance(name)
    categories = [row.category for row in probed.rows]
    return {
        "judge": probed.judge,
        "judge_quality": probed.quality(),
        "draws": DRAWS,
        "prompts": {name: categories.count(name) for name in dict.fromkeys(categories)},
        "systems": found,
        results.EVERY_ANSWER: said,
    }


def systems(studied: StudiedRun) -> dict[str, Callable[[], PreTrainedModel]]:
    """All that the run compares, the base model first, and the sequence after each of its middle axes."""
    found: dict[str, Callable[[], PreTrainedModel]] = {}
    for system in studied.compared():
        if system.name == SEQUENTIAL:
            for count in range(2, len(studied.axes)):  # after the first axis it is that axis's specialist
                name = sequential_name(studied.axes[:count])
                found[f"{SEQUENTIAL}, after {studied.axes[count - 1]}"] = partial(studied.fine_tuned, name)
        found[system.name] = system.load
    return found


def by_prompt(hits: Sequence[bool], draws: int) -> list[float]:
    """The percentage of hits among each prompt's answers."""
    return [percent(hits[start : start + draws]) for start in range(0, len(hits), draws)]


def by_category(rows: Sequence[Row], shares: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """By category and in ALL prompts: the mean share, its interval, and how far it is above the base model's."""
    groups: dict[str, list[tuple[float, float]]] = {ALL: list(zip(shares, base, strict=True))}
    for row, pair in zip(rows, groups[ALL], strict=True):
        groups.setdefault(row.category, []).append(pair)
    return {name: _summary(pairs) for name, pairs in groups.items()}


def _summary(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """`error` is the standard error of the difference, which is between the same prompts."""
    share, differences = mean(own for own, _ in pairs), [own - base for own, base in pairs]
    error = stdev(differences) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    return {
        "share": share,
        "interval": interval(share, len(pairs)),
        "above_base": mean(differences),
        "error": error,
    }


def interval(share: float, prompts: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a percentage of so many prompts.

    As if the answers to one prompt were all alike, so it is at least as wide as the answers' own.
    """
    p, z = share / 100, Z * Z / prompts
    centre, half = p + z / 2, Z * math.sqrt(p * (1 - p) / prompts + z / (4 * prompts))
    return 100 * (centre - half) / (1 + z), 100 * (centre + half) / (1 + z)


def show(content: dict[str, Any]) -> None:
    rows = []
    for name, found in content["systems"].items():
        whole = found[ALL]
        low, high = whole["interval"]
        against = "" if name == "base" else f"{whole['above_base']:+.1f} ± {whole['error']:.1f}"
        shares = [f"{found[category]['share']:.1f}" for category in content["prompts"]]
        overall = f"{whole['share']:.1f} ({low:.1f} to {high:.1f})"
        rows.append([plotting.label(name), *shares, overall, against, f"{found['evasive']:.1f}"])
    prompts = sum(content["prompts"].values())
    title = f"% of misaligned answers: {prompts} prompts, {content['draws']} answers to each; judge: {content['judge']}"
    columns = ["system", *content["prompts"], f"{ALL} (95 %)", "above base", "% evasive"]
    console.table(title, columns, rows)
    if quality := content["judge_quality"]:
        console.say("the judge, on held-out questions: " + ", ".join(f"{k} {v:.3g}" for k, v in quality.items()))


def draw(content: dict[str, Any]) -> Figure:
    """Systems by categories: the percentage of misaligned answers, the more the darker."""
    names, columns = list(content["systems"]), [*content["prompts"], ALL]
    values = np.array([[content["systems"][name][column]["share"] for column in columns] for name in names])
    with plotting.styled():
        figure = plotting.figure(0.85 * len(columns) + 2.8, 0.28 * len(names) + 1.5)
        plot = figure.subplots()
        plotting.heat(plot, values, list(map(plotting.label, names)), columns, span=(0.0, 100.0), colours="Reds")
        plot.axhline(0.5, color="black", linewidth=1)
        plot.axvline(len(columns) - 1.5, color="white", linewidth=5)
        plot.set_title("% of misaligned answers")
        return figure
