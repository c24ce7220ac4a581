"""A gate with some of its parts switched off, as it is stored: nothing is retrained but, where said, one linear map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from alignx_ds.data.batches import collate
from alignx_ds.data.encode import LabelledExamples
from alignx_ds.mocae.layer import alignx_layers, gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.routing.gate_terms import gate_terms, sum_of
from alignx_ds.routing.metrics import router_metrics
from alignx_ds.routing.temperature import fit_temperature
from alignx_ds.stages.calibrators import first_of_each_expert
from alignx_ds.study.subject import Subject

Terms = dict[int, dict[str, Tensor]]  # by gate layer and part: [N, E]


@dataclass(frozen=True)
class Judged:
    """What every part of every gate says of the rows that a temperature is fitted on, and of the held-out ones."""

    fitted: Terms
    known: Tensor  # the experts that the first belong to
    tested: Terms
    labels: Tensor

    @classmethod
    def of(cls, model: AlignXForCausalLM, subject: Subject) -> Judged:
        rows = (subject.data.calibration_rows, subject.data.routed)
        fitted, tested = (gate_terms(model, r, subject.pad_id, subject.batch) for r in rows)
        return cls(fitted, torch.tensor(rows[0].experts), tested, torch.tensor(rows[1].experts))

    @property
    def lowest(self) -> int:
        """The layer whose gate decides, in the shared scope, and decides first, in the other."""
        return min(self.tested)

    def temperatures(self, parts: Sequence[str]) -> dict[int, float]:
        """By gate layer: fitted anew on the rows kept back, since fewer parts are otherwise too sure or too unsure."""
        return {layer: fit_temperature(sum_of(terms, *parts), self.known) for layer, terms in self.fitted.items()}

    def figures(self, parts: Sequence[str]) -> dict[str, float]:
        """Accuracy, NLL, ECE and Brier score of the lowest gate with these parts alone."""
        temperature = self.temperatures(parts)[self.lowest]
        return router_metrics(sum_of(self.tested[self.lowest], *parts) / temperature, self.labels)

    def with_linear(self, other: Judged) -> Judged:
        """The same with another's linear parts."""

        def swapped(mine: Terms, theirs: Terms) -> Terms:
            return {layer: terms | {"linear": theirs[layer]["linear"]} for layer, terms in mine.items()}

        return replace(self, fitted=swapped(self.fitted, other.fitted), tested=swapped(self.tested, other.tested))


@contextmanager
def serving(
    model: AlignXForCausalLM,
    parts: Sequence[str],
    top_k: int,
    temperatures: dict[int, float] | None = None,
    routers: dict[int, Tensor] | None = None,
) -> Iterator[None]:
    """Inside, the model's gates have these parts only, and that many experts answer.

    Temperatures and linear routers are the stored ones where none are given. The output calibration stays as it is.
    """
    gates, layers = gates_of(model), alignx_layers(model)
    before = [(g.settings, g.router.weight.detach().clone(), g.calibration_temperature.clone()) for g in gates.values()]
    counts = [layer.top_k for layer in layers]
    with torch.no_grad():
        for index, gate in gates.items():
            switchable = ("fractal", "natural", "lexical")
            off: dict[str, Any] = {f"{part}_weight": 0.0 for part in switchable if part not in parts}
            gate.settings = replace(gate.settings, top_k=top_k, **off)
            if routers is not None:
                gate.router.weight.copy_(routers[index])
            gate.router.weight.mul_(float("linear" in parts))
            if temperatures is not None:
                gate.calibration_temperature.fill_(temperatures[index])
        for layer in layers:
            layer.top_k = top_k
        try:
            yield
        finally:
            for gate, (settings, weight, temperature) in zip(gates.values(), before, strict=True):
                gate.settings = settings
                gate.router.weight.copy_(weight)
                gate.calibration_temperature.copy_(temperature)
            for layer, count in zip(layers, counts, strict=True):
                layer.top_k = count


def routers_alone(model: AlignXForCausalLM, subject: Subject) -> dict[int, Tensor]:
    """By gate layer, [E, k]: a linear router fitted by itself, to the training prompts' latents (scikit-learn).

    The stored one was trained to correct the calibrators; alone, it is not what a linear router can do.
    """
    rows = first_of_each_expert(subject.data.train, subject.config.gate.rows)
    labels = np.array(rows.experts)
    found = {}
    for layer, z in _latents(model, rows, subject).items():
        fitted = LogisticRegression(C=1.0, fit_intercept=False, max_iter=1000).fit(z.numpy(), labels)
        weight = torch.zeros(len(model.config.experts), z.shape[1])
        coefficients = torch.from_numpy(fitted.coef_).float()
        # Of two classes scikit-learn fits the difference; a router has a row for each.
        weight[list(fitted.classes_)] = (
            coefficients if len(coefficients) > 1 else torch.cat([-coefficients, coefficients])
        )
        found[layer] = weight * model.config.gate_settings().temperature
    return found


@torch.no_grad()
def _latents(model: AlignXForCausalLM, rows: LabelledExamples, subject: Subject) -> dict[int, Tensor]:
    """By gate layer, [N, k]: the whitened latents of the rows' prompts."""
    seen: dict[int, list[Tensor]] = {layer: [] for layer in gates_of(model)}
    for start in range(0, len(rows.examples), subject.batch):
        prompts = [replace(e, ids=e.ids[: e.prompt_length]) for e in rows.examples[start : start + subject.batch]]
        part = collate(prompts, subject.pad_id).to(model.device)
        model(part.input_ids, part.attention_mask, use_cache=False)
        for layer, gate in gates_of(model).items():
            g = gate.geometry
            seen[layer].append(((model.routing.queries[layer].features - g.centre) @ g.projection.T).cpu())
    return {layer: torch.cat(parts) for layer, parts in seen.items()}
