"""Value-guided decoding: scores and cost of base model and AlignX with a judge that looks ahead of every token.

The judge of a row's axis is the value, and the same judge scores the answer: an upper baseline of what such a search
can gain, not a system to serve. `evaluation.guided` has the equation. A candidate is completed by the model itself
(DeAL), or for the base model by mixed, which is aligned already (Transfer Q*).

α is so large that a candidate whose completion is judged right goes before every other of those likely enough to be
looked at, and the log-probability decides among equals.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import groupby, product
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from transformers import PreTrainedModel

from alignx_ds.evaluation.generate import answers
from alignx_ds.evaluation.guided import Guided
from alignx_ds.evaluation.judges import registry
from alignx_ds.runtime import console
from alignx_ds.study import plotting
from alignx_ds.study.seeds import mean
from alignx_ds.study.studied_run import StudiedRun

CANDIDATES = (2, 4, 8)  # K
ALPHA = 20.0  # nats for an answer that is judged right
GREEDY, OWN, MIXED = "greedy", "completed by itself", "completed by mixed"
WAYS = {"base": (OWN, MIXED), "mixed": (), "alignx": (OWN,)}
Point = dict[str, Any]  # a system decoded in one way


def measure(studied: StudiedRun) -> dict[str, Any]:
    """Scores, forward passes for a token of the answer, and seconds, of every system and way."""
    points, mixed = list[Point](), studied.system("mixed")
    with console.progress("systems", len(WAYS)) as progress:
        for system, ways in WAYS.items():
            model = mixed if system == "mixed" else studied.system(system)
            points.append({"system": system, "way": GREEDY, "k": 1, **_decoded(studied, model)})
            for way, k in product(ways, CANDIDATES):
                guided = Guided(model, mixed if way == MIXED else model, k, ALPHA)
                points.append({"system": system, "way": way, "k": k, **_decoded(studied, guided)})
            progress.advance(system)
    judges = {axis: studied.config.axes[axis].judge for axis in studied.scored_axes}
    return {"alpha": ALPHA, "judges": judges, "points": points + _best_of(studied)}


def _decoded(studied: StudiedRun, how: PreTrainedModel | Guided) -> Point:
    """The scores by axis, all that the judges say, and the cost over all axes."""
    config, tokenizer, batch = studied.config, studied.base.tokenizer, studied.batch
    limit, details, passes, tokens, seconds = config.evaluation.max_new_tokens, dict[str, Any](), 0, 0, 0.0
    for axis in studied.scored_axes:
        rows, judge = studied.data.held_out[axis], registry.make(config.axes[axis].judge, config.judges)
        start = time.perf_counter()
        if isinstance(how, Guided):
            said, cost = how.answers(tokenizer, rows, judge, batch=batch, max_new_tokens=limit)
        else:
            said = answers(how, tokenizer, [row.chat for row in rows], batch=batch, max_new_tokens=limit)
            cost = _tokens(studied, said)
        seconds += time.perf_counter() - start
        details[axis] = judge.metrics(rows, list(judge.verdicts(rows, said)))
        passes, tokens = passes + cost, tokens + _tokens(studied, said)
    scores = {axis: found["score"] for axis, found in details.items()}
    return {"scores": scores, "details": details, "passes": passes / tokens, "seconds": seconds}


def _tokens(studied: StudiedRun, said: Sequence[str]) -> int:
    """Of these answers, the end tokens included where there was room."""
    encoded = studied.base.tokenizer(list(said), add_special_tokens=False)["input_ids"]
    return sum(min(len(ids) + 1, studied.config.evaluation.max_new_tokens) for ids in encoded)


def _best_of(studied: StudiedRun) -> list[Point]:
    """What the run's study of best-of-n has found, where it was made: n answers are n passes for a token of one."""
    path = studied.run.root / "study" / "best-of.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return [
        {"system": system, "way": "best of n", "k": n, "scores": scores, "passes": n, "seconds": None}
        for system, curves in found["systems"].items()
        for n, scores in zip(found["counts"], curves["best"]["alike"], strict=True)
    ]


def show(content: dict[str, Any]) -> None:
    axes, rows = list(content["judges"]), []
    for point in content["points"]:
        values = [point["scores"][axis] for axis in axes]
        seconds = "" if point["seconds"] is None else f"{point['seconds']:.0f}"
        numbers = [*(f"{value:.1f}" for value in (*values, mean(values))), f"{point['passes']:.1f}", seconds]
        rows.append([plotting.label(point["system"]), point["way"], str(point["k"]), *numbers])
    columns = ["system", "decoding", "K or n", *axes, "avg", "passes a token", "seconds"]
    title = f"Guided by the judges that score ({', '.join(content['judges'].values())}): an upper baseline"
    console.table(title, columns, rows, texts=(0, 1))


def draw(content: dict[str, Any]) -> Figure:
    """The mean over the axes against the forward passes for a token of the answer; an axis a plot beside it."""
    axes = list(content["judges"])
    with plotting.styled():
        figure = plotting.figure(2.6 * (len(axes) + 1), 3.2)
        for plot, axis in zip(figure.subplots(1, len(axes) + 1, squeeze=False)[0], ["", *axes], strict=True):
            for (system, way), group in groupby(content["points"], lambda point: (point["system"], point["way"])):
                points = list(group)
                values = [p["scores"][axis] if axis else mean(p["scores"].values()) for p in points]
                label = f"{plotting.label(system)}, {way}"
                plot.plot([p["passes"] for p in points], values, label=label, **_style(system, way))
            plot.set_xscale("log")
            plot.xaxis.set_major_formatter(ScalarFormatter())
            plot.set(xlabel="passes for a token", title=axis or "mean of the axes", ylim=(-3, 103))
            if not axis:
                plot.set_ylabel("score")
        figure.legend(*plot.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        return figure


def _style(system: str, way: str) -> dict[str, Any]:
    colour = {"base": "black", "mixed": plotting.MUTED}.get(system, plotting.ACCENT)
    marker, line = {GREEDY: ("*", ""), OWN: ("o", "-"), MIXED: ("s", "--")}.get(way, (".", ":"))
    return {"color": colour, "marker": marker, "linestyle": line, "markersize": 9 if way == GREEDY else 3.5}
