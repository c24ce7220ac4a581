"""What prompts alone do for the base model, beside what weights do: system prompts, guidelines, rewritten requests.

Every prompt is judged as the request that it was made of, by the axis's own judge. The row with system prompts is told
the axis of every request, which no user tells a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from alignx_ds.config.schema import WORLD_MODELS
from alignx_ds.data.chats import with_system
from alignx_ds.data.encode import encode_prompts
from alignx_ds.data.rows import Chat, Row
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.evaluation.generate import answers
from alignx_ds.evaluation.judges import registry
from alignx_ds.evaluation.judges.protocol import percent
from alignx_ds.runtime import console
from alignx_ds.study import guidelines, plotting, results, rewriting
from alignx_ds.study.guidelines import Guideline, Retriever
from alignx_ds.study.seeds import mean
from alignx_ds.study.studied_run import StudiedRun

JUDGES = (*registry.FREE, "composite")
Prompts = dict[str, list[Chat]]  # by axis, of its held-out rows
WAYS = {
    "system": "base, the axis's system prompt",
    "guidelines": "base, retrieved guidelines",
    "rewritten": "base, rewritten",
}


@dataclass(frozen=True)
class Options:
    """A library of guidelines (default: the shipped one), and what rewrites requests (default: nothing)."""

    library: Path | None = None
    rewrite: str = ""

    @property
    def arguments(self) -> list[str]:
        """As they are recorded: of an absolute path, the last part."""
        path = self.library.name if self.library and self.library.is_absolute() else str(self.library or "")
        given = (("--guidelines", path), (rewriting.OPTION, self.rewrite))
        return [part for option, value in given if value for part in (option, value)]


DEFAULTS = Options()


def measure(studied: StudiedRun, options: Options = DEFAULTS) -> dict[str, Any]:
    """By row: scores by axis, and prompt tokens relative to the request's own. Raises ConfigError before any answer."""
    axes = [name for name, axis in studied.config.axes.items() if axis.judge in JUDGES]
    if not axes:
        expected = f"a run with a judge of {', '.join(JUDGES)}"
        raise ConfigError(Problem("RUN_DIR", str(studied.run.root), expected, "study another run"))
    rewrite = rewriting.rewriter(options.rewrite) if options.rewrite else None
    rows = {axis: studied.data.held_out[axis] for axis in axes}
    plain = {axis: [row.chat for row in own] for axis, own in rows.items()}
    asked: dict[str, Prompts] = {"base": plain}
    if any(studied.config.axes[axis].prompt for axis in axes):
        system = {axis: studied.config.axes[axis].prompt for axis in axes}
        asked[WAYS["system"]] = {axis: [with_system(p, system[axis]) for p in plain[axis]] for axis in axes}
    library, template = _library(studied, options.library)
    found = _retrieved(studied, library, rows)
    asked[WAYS["guidelines"]] = {
        axis: [
            _ask(row, guidelines.with_guidelines(row.prompt, own, template))
            for row, own in zip(rows[axis], found[axis], strict=True)
        ]
        for axis in axes
    }
    if rewrite:
        asked[WAYS["rewritten"]] = {
            axis: [_ask(row, text) for row, text in zip(own, rewrite([row.prompt for row in own]), strict=True)]
            for axis, own in rows.items()
        }
    systems, said = _answered(studied, rows, asked)
    share = {axis: percent([any(g.axis == axis for g in own) for own in found[axis]]) for axis in axes}
    return {
        "axes": axes,
        "rewrite": options.rewrite,
        "retrieved": share,
        "systems": systems,
        results.EVERY_ANSWER: said,
    }


def _library(studied: StudiedRun, path: Path | None) -> tuple[list[Guideline], str]:
    """The guidelines of the run's axes, and how they are put into a prompt. Raises ConfigError where it has none."""
    in_world = studied.config.model.path in WORLD_MODELS
    every = guidelines.read(path) if path else list(guidelines.WORLD) if in_world else guidelines.shipped()
    own = [g for g in every if g.axis in studied.axes]
    if not own:
        expected, fix = f"guidelines for one of {', '.join(studied.axes)}", "give a file that has some"
        raise ConfigError(Problem("--guidelines", str(path or "the shipped ones"), expected, fix))
    return own, guidelines.WORLD_TEMPLATE if in_world else guidelines.TEMPLATE


def _retrieved(
    studied: StudiedRun, library: Sequence[Guideline], rows: Mapping[str, Sequence[Row]]
) -> dict[str, list[list[Guideline]]]:
    known = {name: learned for name, (learned, _) in studied.training_rows().items()}
    retriever = Retriever(known, library)
    return {axis: retriever.retrieve([row.asked for row in own]) for axis, own in rows.items()}


def _ask(row: Row, text: str) -> Chat:
    return replace(row, prompt=text).chat


def _answered(
    studied: StudiedRun, rows: Mapping[str, list[Row]], asked: Mapping[str, Prompts]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores and relative prompt tokens of the base model for each way of asking, and of mixed and AlignX."""
    plain, base = asked["base"], studied.base_model()
    found, said = {}, list[dict[str, Any]]()
    judges = {axis: registry.make(studied.config.axes[axis].judge, studied.config.judges) for axis in rows}
    tokenizer, limit = studied.base.tokenizer, studied.config.evaluation.max_new_tokens
    models: dict[str, Callable[[], PreTrainedModel]] = dict.fromkeys(asked, lambda: base)
    models |= {"mixed": lambda: studied.system("mixed"), "alignx": studied.aligned}
    with console.progress("systems", len(models)) as progress:
        for name, load in models.items():
            model, prompts, scores = load(), asked.get(name, plain), dict[str, Any]()
            for axis, own in rows.items():
                made = answers(model, tokenizer, prompts[axis], batch=studied.batch, max_new_tokens=limit)
                scores[axis] = judges[axis].metrics(own, list(judges[axis].verdicts(own, made)))["score"]
                said += [
                    {"system": name, "axis": axis, "prompt": _text(chat), "answer": text}
                    for chat, text in zip(prompts[axis], made, strict=True)
                ]
            found[name] = scores | {"tokens": _tokens(studied, prompts) / _tokens(studied, plain)}
            progress.advance(name)
    return found, said


def _text(chat: Chat) -> str:
    return "\n\n".join(turn.text for turn in chat)


def _tokens(studied: StudiedRun, prompts: Prompts) -> int:
    return sum(len(ids) for own in prompts.values() for ids in encode_prompts(own, studied.base.tokenizer))


def show(content: dict[str, Any]) -> None:
    axes = content["axes"]
    rows = [
        [plotting.label(name), *(f"{value:.1f}" for value in _scores(found, axes)), f"{found['tokens']:.2f}"]
        for name, found in content["systems"].items()
    ]
    columns = ["system", *axes, "avg", "prompt tokens"]
    console.table("Prompts beside weights; tokens relative to the request's own", columns, rows)
    shares = ", ".join(f"{axis} {share:.1f} %" for axis, share in content["retrieved"].items())
    console.say(f"requests that got a guideline of their own axis: {shares}")


def _scores(found: Mapping[str, float], axes: Sequence[str]) -> list[float]:
    values = [found[axis] for axis in axes]
    return [*values, mean(values)]


def draw(content: dict[str, Any]) -> Figure:
    """A row a system, with its scores; below the line, those with other weights."""
    axes, names = content["axes"], list(content["systems"])
    values = np.array([_scores(found, axes) for found in content["systems"].values()])
    with plotting.styled():
        figure = plotting.figure(1.3 * len(axes) + 4.0, 0.28 * len(names) + 0.9)
        plot = figure.subplots()
        plotting.heat(plot, values, list(map(plotting.label, names)), [*axes, "avg"], span=(0.0, 100.0))
        plot.axhline(len(names) - 2.5, color="black", linewidth=1)
        plot.set_title("Scores: other prompts above, other weights below")
        return figure
