"""What a fine-tune keeps of what was learned before it: two terms beside its loss.

    ½ λ Σᵢ Fᵢ (θᵢ − θᵢ*)²           F: how much the answers learned before depend on a weight
    ½ μ Σ_W Σⱼ ⟨W − W*, τ̂ⱼ⟩²        τ̂ⱼ: a task vector learned before, of length 1 in every projection W

θ* are the weights that training starts from. F is the diagonal of the empirical Fisher information (Kirkpatrick et al.
2017, arXiv 1612.00796) at θ*: the mean over rows of the squared gradient of a whole answer's NLL, divided by its mean
over all weights, so that λ does not depend on the model. The second term is ours, after AlignGuard-LoRA (arXiv
2508.02079), whose collision term is between two parts of one update.

The terms depend on the weights alone. `before_step` finds their gradient once a step, from the fp32 weights, and a hook
on each weight adds it in the backward pass: to the gradient of a micro batch, before DeepSpeed averages and shards it.
Every rank has every world-size-th row of the constants and adds the gradient of these rows, so no ZeRO stage matters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alignx_ds.config.schema import KeepConfig
from alignx_ds.data.batches import MicroBatch
from alignx_ds.data.encode import LabelledExamples
from alignx_ds.runtime import distributed
from alignx_ds.runtime.deepspeed import load_deepspeed
from alignx_ds.training.engine import Plan
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.loop import builder
from alignx_ds.training.losses import language_loss
from alignx_ds.training.metrics import StepMetrics, summed
from alignx_ds.training.rehearsal import rehearse


@dataclass
class KeptWeight:
    """A trained weight [m, n], and this rank's rows [r, n] fp32 of what its terms are made of."""

    parameter: nn.Parameter
    directions: list[Tensor]  # τ̂ⱼ
    start: Tensor  # θ*
    fisher: Tensor
    gradient: Tensor  # of both terms, in this step

    @classmethod
    def of(cls, parameter: nn.Parameter, vectors: list[Tensor]) -> KeptWeight:
        """`vectors` are the task vectors learned before, [m, n] fp32 each. Collective."""
        start = _own(_whole(parameter))
        directions = [_own(v / v.norm().clamp(min=torch.finfo(v.dtype).tiny)).to(start.device) for v in vectors]
        return cls(parameter, directions, start, torch.zeros_like(start), torch.zeros_like(start))


class Keeping:
    """Both terms of one fine-tune. `rows` are those learned before, on which F is estimated.

    `vectors` has the task vectors learned before, [m, n] fp32, of each trained weight.
    """

    def __init__(
        self,
        settings: KeepConfig,
        vectors: list[tuple[nn.Parameter, list[Tensor]]],
        rows: LabelledExamples,
        plan: Plan,
        pad_id: int,
    ) -> None:
        self.settings, self.vectors, self.rows, self.plan = settings, vectors, rows, plan
        self.build = builder(rows, pad_id, packed=True)
        self.weights: list[KeptWeight] = []
        self.is_measuring = False
        self.terms: dict[str, float] = {}  # of the last step, unweighted

    def of_job(self, job: TrainingJob) -> TrainingJob:
        """The job, with these terms in its gradients and its curve."""

        def at_start(engine: Any) -> None:
            job.at_start(engine)
            self.at_start(engine)

        def before_step(engine: Any, parts: list[MicroBatch]) -> None:
            job.before_step(engine, parts)
            self.before_step()

        def scalars(metrics: StepMetrics) -> dict[str, float]:
            return job.scalars(metrics) | self.terms

        return replace(job, at_start=at_start, before_step=before_step, scalars=scalars)

    def at_start(self, engine: Any) -> None:
        """Keep θ* and estimate F, before any checkpoint is loaded. Collective."""
        self.weights = [KeptWeight.of(parameter, before) for parameter, before in self.vectors]
        self.vectors = []
        for weight in self.weights:
            tensor: Any = weight.parameter
            tensor.register_hook(partial(self._hook, weight))
        if self.settings.fisher and self.rows.examples:
            self._measure(engine)

    def _measure(self, engine: Any) -> None:
        """F, row by row; every rank has the same row, and squares its own rows of the gradient."""
        device = distributed.device()
        self.is_measuring = True
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for number in range(len(self.rows.examples)):
                engine.set_gradient_accumulation_boundary(is_boundary=False)
                part = self.build((number,), float(self.plan.accumulation))  # by which DeepSpeed divides
                engine.backward(language_loss(engine, part).loss)
        self.is_measuring = False
        rehearse(engine, part, language_loss)  # which drops the gradients
        (total,) = summed([torch.stack([w.fisher.sum() for w in self.weights]).sum()])
        (numbers,) = summed([sum(w.fisher.numel() for w in self.weights)])
        for weight in self.weights:
            weight.fisher *= float(numbers / total)

    @torch.no_grad()
    def before_step(self) -> None:
        """Find the gradient of both terms at the present weights. Collective."""
        changes = [_own(_whole(w.parameter)) - w.start for w in self.weights]
        moved = [(w.fisher * change.square()).sum() for w, change in zip(self.weights, changes, strict=True)]
        along = [(d * change).sum() for w, change in zip(self.weights, changes, strict=True) for d in w.directions]
        sums = summed([*moved, *along])
        projected = sums[len(moved) :].float()
        terms = torch.stack([sums[: len(moved)].sum(), sums[len(moved) :].square().sum()]) / 2
        self.terms = dict(zip(("keep/fisher", "keep/collision"), terms.tolist(), strict=True))
        following = iter(projected)
        for weight, change in zip(self.weights, changes, strict=True):
            weight.gradient = self.settings.fisher * weight.fisher * change
            for direction in weight.directions:
                weight.gradient += self.settings.collision * next(following) * direction

    def _hook(self, weight: KeptWeight, gradient: Tensor) -> Tensor | None:
        """`gradient` [m, n] is this rank's, of a micro batch, divided by the micro batches of a step."""
        if self.is_measuring:
            weight.fisher += _own(gradient).float().square()
            return None
        whole = gradient.clone()
        share = distributed.world_size() / self.plan.accumulation  # of a mean over ranks, and a sum over micro batches
        _own(whole).add_(share * weight.gradient)
        return whole


def _whole(parameter: nn.Parameter) -> Tensor:
    """The fp32 weight [m, n], on this rank's device. Collective."""
    found = load_deepspeed().utils.safe_get_full_fp32_param(parameter)
    assert found is not None, "every weight whose change is kept small is trained"
    whole: Tensor = found.detach().to(distributed.device(), torch.float32)
    return whole


def _own(whole: Tensor) -> Tensor:
    """A view of this rank's rows."""
    return whole[distributed.rank() :: distributed.world_size()]
