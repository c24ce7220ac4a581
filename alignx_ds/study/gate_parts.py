"""Gates with some of their parts switched off. Nothing is retrained, except for a linear router fitted on its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignx_ds.mocae.layer import alignx_layers, gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.routing.fit_router import RouterRows, fit_router, router_rows
from alignx_ds.routing.gate_terms import gate_terms, sum_of
from alignx_ds.routing.metrics import router_metrics
from alignx_ds.routing.temperature import fit_temperature
from alignx_ds.stages.calibrators import first_of_each_set
from alignx_ds.study.studied_run import StudiedRun

Router = dict[str, Tensor]  # the state of a gate's linear router
Terms = dict[int, dict[str, Tensor]]  # the terms of the gates' logits by gate layer and part: [N, E]


@dataclass(frozen=True)
class GateTerms:
    """The terms of every gate's logits, on the calibration split and on the held-out prompts."""

    calibration: Terms
    calibration_labels: Tensor  # [N, E]: label sets
    held_out: Terms
    held_out_labels: Tensor
    kind: str  # of the gates
    weights: Tensor | None  # of the calibration split's rows

    @classmethod
    def of(cls, model: AlignXForCausalLM, studied: StudiedRun) -> GateTerms:
        rows = (studied.data.calibration_rows, studied.data.routed)
        calibration, held_out = (gate_terms(model, r, studied.pad_id, studied.batch) for r in rows)
        labels = [r.multi_hot(len(model.config.experts)) for r in rows]
        return cls(calibration, labels[0], held_out, labels[1], model.config.gate_settings().kind, rows[0].weights())

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parts, the further calibrators of `gate.more` too."""
        return tuple(self.held_out[self.lowest])

    @property
    def lowest(self) -> int:
        """The lowest gate's layer; with a shared gate it is the only one."""
        return min(self.held_out)

    def temperatures(self, parts: Sequence[str]) -> dict[int, float]:
        """By gate layer: the post-hoc temperature of a gate with these parts alone, fitted on the calibration split."""
        labels, kind, weights = self.calibration_labels, self.kind, self.weights
        return {
            i: fit_temperature(sum_of(terms, *parts), labels, kind, weights) for i, terms in self.calibration.items()
        }

    def metrics(self, parts: Sequence[str]) -> dict[str, float]:
        """Accuracy, NLL, ECE and Brier score of the lowest gate with these parts alone."""
        temperature = self.temperatures(parts)[self.lowest]
        logits = sum_of(self.held_out[self.lowest], *parts) / temperature
        return router_metrics(logits, self.held_out_labels, self.kind)

    def with_linear(self, other: GateTerms) -> GateTerms:
        """These terms, with the other's linear ones in place of their own."""

        def swapped(own: Terms, others: Terms) -> Terms:
            return {layer: terms | {"linear": others[layer]["linear"]} for layer, terms in own.items()}

        return replace(
            self,
            calibration=swapped(self.calibration, other.calibration),
            held_out=swapped(self.held_out, other.held_out),
        )


@contextmanager
def gate_with(
    model: AlignXForCausalLM,
    parts: Sequence[str],
    top_k: int,
    temperatures: dict[int, float] | None = None,
    routers: dict[int, Router] | None = None,
) -> Iterator[None]:
    """Within it, the model's gates have these parts only, and `top_k` experts answer each prompt.

    Temperatures and linear routers, by gate layer, replace the stored ones. The output calibration is not changed.
    """
    gates, layers = gates_of(model), alignx_layers(model)
    before = [(g.settings, deepcopy(g.router.state_dict()), g.calibration_temperature.clone()) for g in gates.values()]
    settings_of_layers = [layer.settings for layer in layers]
    with torch.no_grad():
        for index, gate in gates.items():
            switchable = ("fractal", "natural", "lexical")
            off: dict[str, Any] = {part: 0.0 for part in switchable if part not in parts}
            more = {name: weight for name, weight in gate.settings.more.items() if name in parts}
            gate.settings = replace(gate.settings, top_k=top_k, more=more, **off)
            if routers is not None:
                gate.router.load_state_dict(routers[index])
            for parameter in gate.router.parameters():
                parameter.mul_(float("linear" in parts))
            if temperatures is not None:
                gate.calibration_temperature.fill_(temperatures[index])
        for layer in layers:
            layer.settings = replace(layer.settings, top_k=top_k)
        try:
            yield
        finally:
            for gate, (settings, router, temperature) in zip(gates.values(), before, strict=True):
                gate.settings = settings
                gate.router.load_state_dict(router)
                gate.calibration_temperature.copy_(temperature)
            for layer, settings in zip(layers, settings_of_layers, strict=True):
                layer.settings = settings


def linear_routers(model: AlignXForCausalLM, studied: StudiedRun) -> dict[int, Router]:
    """The states of linear routers by gate layer, fitted to the training prompts' latents without any calibrator.

    The stored router was fitted and trained beside the calibrators; alone it is worse than a linear router can be.
    """
    data, rows = studied.data, studied.config.gate.rows
    seen, unseen = (
        router_rows(model, part, studied.pad_id, studied.batch)
        for part in (first_of_each_set(data.train, rows), data.calibration_rows)
    )

    def alone(part: RouterRows) -> RouterRows:
        return replace(part, offsets=torch.zeros_like(part.offsets))

    return {
        layer: fit_router(alone(seen[layer]), alone(unseen[layer]), gate.geometry.present.cpu(), gate.settings)
        for layer, gate in gates_of(model).items()
    }
