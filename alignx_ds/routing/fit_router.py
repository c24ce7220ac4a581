"""Fits the linear router of a gate for needs: logistic regression on the latents, with the calibrators as offsets.

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
from scipy.special import expit
from torch import Tensor

from alignx_ds.data.encode import LabelledExamples
from alignx_ds.mocae.gate import CalibratedGate, Query, need_logits
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.mocae.serving import gates_of_needs
from alignx_ds.routing.gate_terms import on_prompts
from alignx_ds.routing.temperature import smoothed_needs

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
    rows: RouterRows, unseen: RouterRows, present: Tensor, penalties: Sequence[float] = PENALTIES
) -> dict[str, Tensor]:
    """The router's state dict, fp32: weight [E, k] and bias [E]; zero for the generalist and for absent experts.

    Every axis has its own regression and its own penalty, the one with the least loss on `unseen`, the calibration
    split. Labels are smoothed as they are for the temperature, so that rows which can be told apart without a fault
    have a finite fit. `present` [E] is 1 for the experts that have queries of their own.
    """
    experts, latent = rows.needs.shape[1], rows.latents.shape[1]
    weight, bias = torch.zeros(experts, latent), torch.zeros(experts)
    for expert in range(1, experts):
        if present[expert]:
            best = _best(_Regression.of(rows, expert), _Regression.of(unseen, expert), penalties)
            weight[expert], bias[expert] = torch.from_numpy(best[:-1]), float(best[-1])
    return {"weight": weight, "bias": bias}


@dataclass(frozen=True)
class _Regression:
    """The logistic regression of one axis: inputs [N, k + 1], the last of them 1, offsets, targets and weights [N]."""

    inputs: Vector
    offsets: Vector
    targets: Vector
    weights: Vector

    @classmethod
    def of(cls, rows: RouterRows, expert: int) -> _Regression:
        count = len(rows.latents)
        weights = torch.ones(count) if rows.weights is None else rows.weights
        columns = [need_logits(rows.offsets), smoothed_needs(rows.needs[:, 1:].double())]
        offsets, targets = (column[:, expert - 1].double().numpy() for column in columns)
        inputs = torch.cat([rows.latents, torch.ones(count, 1)], dim=-1).double().numpy()
        return cls(inputs, offsets, targets, weights.double().numpy() / count)

    def loss(self, x: Vector) -> float:
        """The weighted mean of the cross-entropies, in nats."""
        logits = self.inputs @ x + self.offsets
        return float(self.weights @ (np.logaddexp(0, logits) - self.targets * logits))

    def fit(self, penalty: float, start: Vector) -> Vector:
        """The [k + 1] of least loss plus ½·penalty·‖w‖²; the bias is free."""
        ridge = np.append(np.full(len(start) - 1, penalty), 0.0)

        def value(x: Vector) -> tuple[float, Vector]:
            gradient = self.inputs.T @ (self.weights * (expit(self.inputs @ x + self.offsets) - self.targets))
            return self.loss(x) + 0.5 * float(ridge @ x**2), gradient + ridge * x

        def curvature(x: Vector) -> Vector:
            p = expit(self.inputs @ x + self.offsets)
            whole: Vector = (self.inputs.T * (self.weights * p * (1 - p))) @ self.inputs + np.diag(ridge)
            return whole

        found: Vector = minimize(
            value, start, jac=True, hess=curvature, method="trust-exact", options={"gtol": ACCURACY}
        ).x
        return found


def _best(seen: _Regression, unseen: _Regression, penalties: Sequence[float]) -> Vector:
    """The fit to `seen` whose penalty suits `unseen` best; each begins where the one before ended."""
    fits: list[Vector] = []
    for penalty in penalties:
        fits.append(seen.fit(penalty, fits[-1] if fits else np.zeros(seen.inputs.shape[1])))
    return min(fits, key=unseen.loss)
