"""Fits the linear router of a gate: regression on the latents, with the calibrators as offsets.

A router that starts at zero would have to learn within stage 2's few steps what this fit finds at once. Ours, not the
paper's (docs/method.md). Shapes: N prompts, k latent size, E experts; the generalist is expert 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logsumexp, softmax
from torch import Tensor

from alignx_ds.data.encode import LabelledExamples
from alignx_ds.mocae.gate import CalibratedGate, Query
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.mocae.serving import gates_of_needs
from alignx_ds.mocae.settings import GateSettings
from alignx_ds.routing.gate_terms import on_prompts
from alignx_ds.routing.temperature import smoothed_choice, smoothed_needs

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)  # of ½‖w‖², beside a mean over prompts
ACCURACY = 1e-9  # of the gradient: the fit ends so near the minimum that only rounding is left

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class RouterRows:
    """What a router is fitted on, fp32: latents z [N, k], the other terms' sum [N, E], label sets [N, E], weights [N].

    Without `weights` all prompts weigh alike.
    """

    latents: Tensor
    offsets: Tensor
    needs: Tensor
    weights: Tensor | None = None


def router_rows(model: AlignXForCausalLM, rows: LabelledExamples, pad_id: int, batch: int) -> dict[int, RouterRows]:
    """By the gate's layer, from the prompts alone. Collective; every rank returns all rows, in their order.

    The needed experts are forced: a gate above other AlignX layers sees what it will see in use.
    """

    def inputs(gate: CalibratedGate, query: Query) -> Tensor:
        return torch.cat([gate.latent(query), gate.calibrators_alone(query)], dim=-1)

    experts = len(model.config.experts)
    needs, weights = rows.multi_hot(experts), rows.weights()
    found = on_prompts(model, rows, pad_id, batch, inputs, gates_of_needs(needs[:, 1:]))
    return {i: RouterRows(both[:, :-experts], both[:, -experts:], needs, weights) for i, both in found.items()}


def fit_router(
    rows: RouterRows,
    unseen: RouterRows,
    present: Tensor,
    settings: GateSettings,
    penalties: Sequence[float] = PENALTIES,
) -> dict[str, Tensor]:
    """The router's state dict for a gate with these settings, fp32: weight [E, k] and bias [E], 0 for absent experts.

    In a choice the experts have one multinomial regression. In needs every axis has a logistic regression of its own,
    and the generalist's weights are zero. Each regression has the penalty of least loss on `unseen`, the calibration
    split. Labels are smoothed as they are for the temperature, so that rows which can be told apart without a fault
    have a finite fit. `present` [E] is 1 for the experts that have queries of their own.
    """
    experts, latent = rows.needs.shape[1], rows.latents.shape[1]
    fitted = torch.zeros(experts, latent + 1)
    there = [expert for expert in range(experts) if present[expert]]
    for columns in [there] if settings.kind == "choice" else [[expert] for expert in there if expert]:
        seen, other = (_Regression.of(part, columns, settings.kind) for part in (rows, unseen))
        fitted[columns] = _best(seen, other, penalties)
    fitted *= settings.temperature  # by which the gate divides what its router says
    return {"weight": fitted[:, :-1].contiguous(), "bias": fitted[:, -1].contiguous()}


@dataclass(frozen=True)
class _Regression:
    """A regression of c columns: inputs [N, k + 1], the last of them 1, offsets and targets [N, c], weights [N].

    The columns compete in a choice; in needs each is a logistic regression.
    """

    inputs: Vector
    offsets: Vector
    targets: Vector
    weights: Vector
    kind: str

    @classmethod
    def of(cls, rows: RouterRows, experts: list[int], kind: str) -> _Regression:
        count = len(rows.latents)
        weights = torch.ones(count) if rows.weights is None else rows.weights
        needs, offsets = rows.needs[:, experts].double(), rows.offsets[:, experts]
        if kind == "needs":
            offsets, targets = offsets - rows.offsets[:, :1], smoothed_needs(needs)
        else:
            targets = smoothed_choice(needs)
        inputs = torch.cat([rows.latents, torch.ones(count, 1)], dim=-1)
        columns = [t.double().numpy() for t in (inputs, offsets, targets, weights / count)]
        return cls(columns[0], columns[1], columns[2], columns[3], kind)

    def loss(self, fitted: Vector) -> float:
        """The weighted mean of the cross-entropies in nats; `fitted` [c, k + 1]."""
        return self._loss(self.inputs @ fitted.T + self.offsets)

    def _loss(self, logits: Vector) -> float:
        whole = logsumexp(logits, axis=-1) if self.kind == "choice" else np.logaddexp(0, logits).sum(-1)
        return float(self.weights @ (whole - (self.targets * logits).sum(-1)))

    def fit(self, penalty: float, start: Vector) -> Vector:
        """The [c, k + 1] of least loss plus ½·penalty·‖w‖²; the biases are free."""
        ridge = np.append(np.full(start.shape[1] - 1, penalty), 0.0)

        def value(x: Vector) -> tuple[float, Vector]:
            weights = x.reshape(start.shape)
            logits = self.inputs @ weights.T + self.offsets
            p = softmax(logits, axis=-1) if self.kind == "choice" else expit(logits)
            gradient = (self.weights[:, None] * (p - self.targets)).T @ self.inputs + ridge * weights
            return self._loss(logits) + 0.5 * float((ridge * weights**2).sum()), gradient.ravel()

        limits = {"maxiter": 10_000, "maxfun": 20_000, "ftol": 0.0, "gtol": ACCURACY}
        found: Vector = minimize(value, start.ravel(), jac=True, method="L-BFGS-B", options=limits).x
        return found.reshape(start.shape)


def _best(seen: _Regression, unseen: _Regression, penalties: Sequence[float]) -> Tensor:
    """[c, k + 1]: the fit to `seen` whose penalty suits `unseen` best; each begins where the one before ended."""
    fits = [np.zeros((seen.offsets.shape[1], seen.inputs.shape[1]))]
    for penalty in penalties:
        fits.append(seen.fit(penalty, fits[-1]))
    return torch.from_numpy(min(fits[1:], key=unseen.loss)).float()
