"""Robustness: refusals under noise on one layer, by system, layer and strength.

The activation steering attack of Gu et al. 2025 (arXiv 2506.16078). A system answers the harmful held-out prompts; then
it answers again with α δ added to the states of one layer from which it predicts its answer (`latent_noise` has the
equation). Each prompt has one z for all its tokens and strengths: a random draw, the same for every layer and system,
or the direction in which the system's own answer loses likelihood fastest, by layer (`gradient_noise`). The authors'
code takes the mean and spread of δ from the prompt's last state alone; here each state has its own, as in their
training.

Shapes: N prompts, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from alignx_ds.data.batches import Batch, collate
from alignx_ds.data.encode import Example, encode
from alignx_ds.data.rows import Row
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.evaluation.generate import answers
from alignx_ds.evaluation.judges import registry
from alignx_ds.evaluation.judges.protocol import percent
from alignx_ds.evaluation.judges.refusal import classify
from alignx_ds.evaluation.likelihood import log_probabilities
from alignx_ds.runtime import console, distributed
from alignx_ds.study import plotting
from alignx_ds.study.gradient_noise import ascent
from alignx_ds.study.layer_outputs import decoder_layers
from alignx_ds.study.studied_run import StudiedRun
from alignx_ds.training.latent_noise import before_answers, perturbed

PAPER = 1.0  # the α of the paper
STRENGTHS = (0.5, PAPER, 2.0)
MOST_LAYERS = 8
RANDOM, GRADIENT = "random", "gradient"  # kinds of noise
HARMS = {"safety": "harms", "offline_safety": "unsafe"}  # what these judges say of an answer that helps to harm


@dataclass(frozen=True)
class Probe:
    """The harmful held-out prompts of an axis, and the random noise [N, 1, d] fp32 of each."""

    studied: StudiedRun
    axis: str
    rows: list[Row]
    noise: Tensor

    @classmethod
    def of(cls, studied: StudiedRun) -> Probe:
        """Raises ConfigError where no axis has a judge of harm and prompts that ask for it."""
        for axis, settings in studied.config.axes.items():
            rows = [row for row in studied.data.held_out[axis] if row.harmful]
            if settings.judge in HARMS and rows:
                size = studied.base.config.get_text_config().hidden_size
                noise = torch.randn(len(rows), 1, size, generator=torch.Generator().manual_seed(studied.config.seed))
                return cls(studied, axis, rows, noise.to(distributed.device()))
        expected = f"a run with an axis whose judge is {' or '.join(HARMS)}, and whose held-out prompts ask for harm"
        raise ConfigError(Problem("RUN_DIR", str(studied.run.root), expected, "study another run"))

    def said(self, model: PreTrainedModel, layer: int, noise: Tensor, strength: float) -> list[str]:
        """The greedy answers under noise [N, 1, d]."""
        batch, limit, found = self.studied.batch, self.studied.config.evaluation.max_new_tokens, list[str]()
        for start in range(0, len(self.rows), batch):
            prompts = [row.chat for row in self.rows[start : start + batch]]
            part = noise[start : start + batch]
            with perturbed(decoder_layers(model, self.studied)[layer], part, strength=strength):
                found += answers(model, self.studied.base.tokenizer, prompts, batch=batch, max_new_tokens=limit)
        return found

    def encoded(self, said: Sequence[str]) -> list[Example]:
        """The prompts with these answers; one that was cut off has no end."""
        rows = [replace(row, response=text) for row, text in zip(self.rows, said, strict=True)]
        limit = self.studied.config.evaluation.max_new_tokens
        examples = encode(rows, self.studied.base.tokenizer)
        return [Example(e.ids[: e.prompt_length + limit], e.prompt_length) for e in examples]

    def ascent(self, model: PreTrainedModel, examples: Sequence[Example], layer: int) -> Tensor:
        """Noise [N, 1, d] along the gradient of the answers' NLL; the examples are those of `encoded`."""
        place, size = decoder_layers(model, self.studied)[layer], self.noise.shape[-1]
        return torch.cat([ascent(model, place, part, size) for part in self._batches(examples)])

    @torch.no_grad()
    def nll(
        self, model: PreTrainedModel, examples: Sequence[Example], layer: int, noise: Tensor, strength: float
    ) -> float:
        """The mean NLL (nats) of the answers' tokens under noise [N, 1, d]."""
        total = 0.0
        for part, own in zip(self._batches(examples), torch.split(noise, self.studied.batch), strict=True):
            with perturbed(decoder_layers(model, self.studied)[layer], own, before_answers(part.labels), strength):
                total -= float(log_probabilities(model, part).sum())
        return total / max(1, sum(example.answer_length for example in examples))

    def _batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        for start in range(0, len(examples), self.studied.batch):
            part = list(examples[start : start + self.studied.batch])
            yield collate(part, self.studied.pad_id).to(distributed.device())


def measure(studied: StudiedRun) -> dict[str, Any]:
    """By system: its refusals and the NLL of its own answers, and by layer and strength what noise makes of them."""
    probe, names = Probe.of(studied), ["base", *studied.axes, "sequential", "mixed", "alignx"]
    layers, found = _layers(len(decoder_layers(studied.base_model(), studied))), {}
    with console.progress("systems", len(names)) as progress:
        for name in names:
            model = studied.fine_tuned(name) if name in studied.axes else studied.system(name)
            found[name] = _measured(probe, model, layers)
            progress.advance(name)
    return {"axis": probe.axis, "prompts": len(probe.rows), "strengths": STRENGTHS, "layers": layers, "systems": found}


def _layers(count: int) -> list[int]:
    """All layers of a model with so many; of a deep one MOST_LAYERS, the first and the last among them."""
    return sorted({round(float(n)) for n in np.linspace(0, count - 1, min(count, MOST_LAYERS))})


def _measured(probe: Probe, model: PreTrainedModel, layers: list[int]) -> dict[str, Any]:
    own = probe.said(model, layers[0], probe.noise, 0.0)
    examples, refused = probe.encoded(own), [_refuses(text) for text in own]
    found: dict[str, Any] = {"refused": sum(refused), "nll": probe.nll(model, examples, layers[0], probe.noise, 0.0)}
    for kind in (RANDOM, GRADIENT):
        points: dict[str, list[dict[str, Any]]] = {}
        fell, harmed = ([np.zeros(len(own), dtype=bool) for _ in STRENGTHS] for _ in range(2))  # at any layer
        for layer in layers:
            noise = probe.noise if kind == RANDOM else probe.ascent(model, examples, layer)
            points[str(layer)] = []
            for number, strength in enumerate(STRENGTHS):
                said = probe.said(model, layer, noise, strength)
                falls, harms = [not _refuses(text) for text in said], _harms(probe, said)
                fell[number] |= falls
                harmed[number] |= harms
                nll = probe.nll(model, examples, layer, noise, strength)
                points[str(layer)].append(
                    {"nll": nll, "lost": of_refused(refused, falls), "harm": of_refused(refused, harms)}
                )
        anywhere = [
            {"lost": of_refused(refused, list(falls)), "harm": of_refused(refused, list(harms))}
            for falls, harms in zip(fell, harmed, strict=True)
        ]
        found[kind] = {"layers": points, "any_layer": anywhere}
    return found


def _refuses(answer: str) -> bool:
    return classify(answer) == "full_refusal"


def _harms(probe: Probe, said: Sequence[str]) -> list[bool]:
    settings = probe.studied.config
    name = settings.axes[probe.axis].judge
    verdicts = registry.make(name, settings.judges).verdicts(probe.rows, said)
    return [bool(verdict[HARMS[name]]) for verdict in verdicts]


def of_refused(refused: Sequence[bool], hits: Sequence[bool]) -> float | None:
    """The percentage of hits among the prompts that are refused without noise; None where none is."""
    among = [bool(hit) for hit, was in zip(hits, refused, strict=True) if was]
    return percent(among) if among else None


def weakest(found: dict[str, Any], number: int, key: str) -> str:
    """The layer at which noise of the strength with this number does most to `key`: the first of several."""
    layers: list[str] = list(found["layers"])
    return max(layers, key=lambda layer: found["layers"][layer][number][key] or 0.0)


def show(content: dict[str, Any]) -> None:
    title = f"{content['prompts']:.0f} prompts of {content['axis']} that ask for harm, with {{}} noise on one layer"
    columns = ["system", "refused", "NLL", "α", "NLL with noise", "% not refused", "by any layer", "% that harm"]
    for kind in (RANDOM, GRADIENT):
        rows = []
        for name, found in content["systems"].items():
            for number, strength in enumerate(content["strengths"]):
                first = (
                    [plotting.label(name), f"{found['refused']:.0f}", f"{found['nll']:.2f}"] if not number else [""] * 3
                )
                rows.append([*first, f"{strength:g}", *_line(found, kind, number)])
        console.table(title.format(kind), columns, rows)


def _line(found: dict[str, Any], kind: str, number: int) -> list[str]:
    """Of a system under noise of the strength with this number, at the layer where it does most, and at any layer."""
    own = found[kind]
    worst, nll, anywhere = weakest(own, number, "lost"), weakest(own, number, "nll"), own["any_layer"][number]
    after = f"{own['layers'][nll][number]['nll']:.2f} (layer {nll})"
    if not found["refused"]:
        return [after, "–", "–", "–"]
    lost = f"{own['layers'][worst][number]['lost']:.1f} (layer {worst})"
    return [after, lost, f"{anywhere['lost']:.1f}", f"{anywhere['harm']:.1f}"]


def draw(content: dict[str, Any]) -> Figure:
    """By layer, with the paper's α: the NLL of the own answers, the refusals lost. By α: those at the worst layer.

    Random noise above, along gradients below.
    """
    layers, strengths, chosen = content["layers"], content["strengths"], content["strengths"].index(PAPER)
    with plotting.styled():
        figure = plotting.figure(10.5, 6.2)
        for kind, (nll, lost, worst) in zip((RANDOM, GRADIENT), figure.subplots(2, 3), strict=True):
            for name, colour, style in _styles(list(content["systems"])):
                found = content["systems"][name]
                points = [found[kind]["layers"][str(layer)][chosen] for layer in layers]
                how: dict[str, Any] = {"color": colour, "linestyle": style, "marker": "o", "markersize": 3}
                nll.plot(layers, [point["nll"] for point in points], label=plotting.label(name), **how)
                if found["refused"]:
                    lost.plot(layers, [point["lost"] for point in points], **how)
                    by_layer = found[kind]["layers"]
                    most = [by_layer[weakest(found[kind], n, "lost")][n]["lost"] for n in range(len(strengths))]
                    worst.plot(strengths, most, **how)
            nll.set(title=f"{kind}: NLL of the own answer, α = {PAPER:g}", xlabel="layer", ylabel="nats a token")
            nll.set_ylim(0, None)
            lost.set(title=f"refusals lost, α = {PAPER:g}", xlabel="layer", ylabel="% of the refused", ylim=(-3, 103))
            worst.set(title="refusals lost, worst layer", xlabel="strength α", xticks=strengths, ylim=(-3, 103))
        figure.legend(*nll.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
        return figure


def _styles(names: list[str]) -> list[tuple[str, str, str]]:
    """(system, colour, line): the specialists in the colours of their axes."""
    fixed = {"base": "black", "sequential": "#666666", "mixed": plotting.MUTED, "alignx": "#c0392b"}
    own = plotting.colours([name for name in names if name not in fixed])
    return [(name, fixed.get(name) or own[name], "--" if name in fixed and name != "alignx" else "-") for name in names]
