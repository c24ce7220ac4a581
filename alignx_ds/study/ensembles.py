"""Ensembles of the specialists beside the run's systems: by token, by answer and by text, with what each costs.

Averaged: every token by the mean of the specialists' logits, or probabilities. Majority: the answer that most of them
give. Instruct and summary: a model of the run reads their answers and writes one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from alignx_ds.data.chats import Prompt
from alignx_ds.data.encode import Example, encode, encode_prompts
from alignx_ds.data.rows import Row
from alignx_ds.evaluation.averaged import MEANS, AveragedDecoder
from alignx_ds.evaluation.decode import Decoder
from alignx_ds.evaluation.generate import answers
from alignx_ds.evaluation.judges import registry
from alignx_ds.evaluation.judges.protocol import Metrics, percent
from alignx_ds.evaluation.likelihood import likelihoods
from alignx_ds.runtime import console
from alignx_ds.study import plotting
from alignx_ds.study.fused_texts import WORDINGS, fusion_prompt, is_tied, majority
from alignx_ds.study.seeds import mean
from alignx_ds.study.studied_run import StudiedRun

FUSERS = ("mixed", "alignx")


@dataclass(frozen=True)
class Said:
    """An answer to every held-out row of an axis, and the tokens of all models that take part."""

    answers: list[str]
    read: int  # tokens of prompts
    decoded: int  # tokens of answers: each is one model's forward pass

    def times(self, models: int) -> Said:
        """The same answers, which so many models read and decode together."""
        return replace(self, read=models * self.read, decoded=models * self.decoded)

    def beside(self, others: Sequence[Said]) -> Said:
        """The same answers, with the cost of these others: they are made of them."""
        read, decoded = (sum(getattr(other, part) for other in others) for part in ("read", "decoded"))
        return replace(self, read=self.read + read, decoded=self.decoded + decoded)


def measure(studied: StudiedRun) -> dict[str, Any]:
    """Scores and costs of the ensembles, the share of tied votes by axis, and the scores in the run's report."""
    axes, rows = studied.scored_axes, studied.data.held_out
    prompts = {axis: [row.chat for row in rows[axis]] for axis in axes}
    specialists = {name: studied.fine_tuned(name) for name in studied.axes}
    models, said = list(specialists.values()), dict[str, dict[str, Said]]()
    own = {
        name: {axis: _said(studied, model, axis, prompts[axis]) for axis in axes} for name, model in specialists.items()
    }
    for kind in MEANS:
        decoder = AveragedDecoder(models, kind)
        said[f"averaged {kind}"] = {
            axis: _said(studied, decoder, axis, prompts[axis]).times(len(models)) for axis in axes
        }
    given = {axis: [found[axis] for found in own.values()] for axis in axes}
    said["majority"] = {axis: _voted(studied, models, rows[axis], given[axis]) for axis in axes}
    del specialists, models, decoder
    for fuser in FUSERS:
        model = studied.system(fuser)
        for name, wording in WORDINGS.items():
            asked = {axis: _fusion_prompts(wording, rows[axis], given[axis]) for axis in axes}
            found = {axis: _said(studied, model, axis, asked[axis]).beside(given[axis]) for axis in axes}
            said[f"{name}, by {plotting.label(fuser)}"] = found
    return {
        "axes": axes,
        "specialists": studied.axes,
        "wordings": WORDINGS,
        "tied": {axis: percent([is_tied(by_row) for by_row in _by_row(given[axis])]) for axis in axes},
        "ensembles": {name: _metrics(studied, found) | _cost(found, given) for name, found in said.items()},
        "run": {name: {axis: found[axis] for axis in axes} for name, found in _reported(studied).items()},
    }


def _reported(studied: StudiedRun) -> dict[str, dict[str, float]]:
    report = studied.run.report
    return report["systems"] if report else {}


def _said(studied: StudiedRun, model: PreTrainedModel | Decoder, axis: str, prompts: Sequence[Prompt]) -> Said:
    """Greedy answers to the axis's held-out rows, asked with these prompts."""
    tokenizer, limit = studied.base.tokenizer, studied.config.evaluation.max_new_tokens
    made = answers(model, tokenizer, prompts, batch=studied.batch, max_new_tokens=limit)
    read = sum(map(len, encode_prompts(prompts, tokenizer)))
    lengths = [example.answer_length for example in _examples(studied, studied.data.held_out[axis], made)]
    return Said(made, read, sum(min(max(1, length), limit) for length in lengths))


def _examples(studied: StudiedRun, rows: Sequence[Row], made: Sequence[str]) -> list[Example]:
    """The rows with these answers; of an empty answer, the prompt alone."""
    return encode([replace(row, response=text) for row, text in zip(rows, made, strict=True)], studied.base.tokenizer)


def _by_row(given: Sequence[Said]) -> list[tuple[str, ...]]:
    return list(zip(*(said.answers for said in given), strict=True))


def _fusion_prompts(wording: str, rows: Sequence[Row], given: Sequence[Said]) -> list[Prompt]:
    return [fusion_prompt(wording, row, texts) for row, texts in zip(rows, _by_row(given), strict=True)]


def _voted(studied: StudiedRun, models: Sequence[PreTrainedModel], rows: Sequence[Row], given: Sequence[Said]) -> Said:
    """The likelihoods that break ties cost nothing more: a model has computed them when it has decoded its answer."""
    sure = [_per_token(studied, model, rows, said.answers) for model, said in zip(models, given, strict=True)]
    by_row = _by_row(given)
    chosen = [texts[majority(texts, own)] for texts, own in zip(by_row, zip(*sure, strict=True), strict=True)]
    return Said(chosen, 0, 0).beside(given)


def _per_token(studied: StudiedRun, model: PreTrainedModel, rows: Sequence[Row], made: Sequence[str]) -> list[float]:
    """The log-likelihood of each answer, over its tokens; of an empty one −∞."""
    found = likelihoods(model, _examples(studied, rows, made), studied.pad_id, studied.batch)
    return [one.per_token if one.tokens else -float("inf") for one in found]


def _metrics(studied: StudiedRun, said: Mapping[str, Said]) -> dict[str, Any]:
    """By axis, the score; under `details`, all that its judge says."""
    details: dict[str, Metrics] = {}
    for axis, found in said.items():
        judge, rows = registry.make(studied.config.axes[axis].judge, studied.config.judges), studied.data.held_out[axis]
        details[axis] = judge.metrics(rows, list(judge.verdicts(rows, found.answers)))
    return {axis: metrics["score"] for axis, metrics in details.items()} | {"details": details}


def _cost(said: Mapping[str, Said], given: Mapping[str, Sequence[Said]]) -> dict[str, float]:
    """Relative to one specialist, the mean of all: forward passes that decode a token, and all tokens, prompts too."""
    passes, tokens = _spent(list(said.values()))
    by_specialist = zip(*given.values(), strict=True)
    of_one = [mean(values) for values in zip(*map(_spent, by_specialist), strict=True)]
    return {"passes": passes / of_one[0], "tokens": tokens / of_one[1]}


def _spent(said: Sequence[Said]) -> tuple[int, int]:
    """(forward passes, tokens)."""
    return sum(s.decoded for s in said), sum(s.read + s.decoded for s in said)


def show(content: dict[str, Any]) -> None:
    axes, rows = content["axes"], []
    for name, found in content["run"].items():
        rows.append([plotting.label(name), *_numbers(found, axes), "", ""])
    for name, found in content["ensembles"].items():
        rows.append([name, *_numbers(found, axes), *(f"{found[part]:.2f}" for part in ("passes", "tokens"))])
    columns = ["system", *axes, "avg", "forward passes", "tokens"]
    console.table("The run's systems, and ensembles of its specialists; costs relative to one model", columns, rows)
    console.say("tied votes: " + ", ".join(f"{axis} {share:.1f} %" for axis, share in content["tied"].items()))


def _numbers(found: Mapping[str, float], axes: Sequence[str]) -> list[str]:
    values = [found[axis] for axis in axes]
    return [f"{value:.1f}" for value in (*values, mean(values))]


def draw(content: dict[str, Any]) -> Figure:
    """A system a row, with its scores; of an ensemble, with the tokens that it costs."""
    axes = content["axes"]
    names = [plotting.label(name) for name in content["run"]]
    names += [f"{name} ({found['tokens']:.1f} ×)" for name, found in content["ensembles"].items()]
    scores = [[found[axis] for axis in axes] for part in ("run", "ensembles") for found in content[part].values()]
    values = np.array([[*row, mean(row)] for row in scores])
    with plotting.styled():
        figure = plotting.figure(1.3 * len(axes) + 4.2, 0.26 * len(names) + 0.9)
        plot = figure.subplots()
        plotting.heat(plot, values, names, [*axes, "avg"], span=(0.0, 100.0))
        plot.axhline(len(content["run"]) - 0.5, color="black", linewidth=1)
        plot.set_title("Scores; in brackets, tokens read and decoded relative to one model")
        return figure
