"""The calibrated gate: a linear router corrected by the fractal, natural and lexical calibrators, all in fp32.

Its logits are read in one of two ways. In a choice the experts compete: the gates are their softmax, as in the paper.
In needs every axis has its own probability r of being needed, the logistic function of its logit less the
generalist's, so that a prompt can need several axes or none. Their gates are r / max(1, Σ r), and the generalist has
what is left to one (serving.gates_of_needs). So several whole needs share a prompt, Σᵢ gᵢ·FFNᵢ is FFN₀ plus the mean of
their differences from it, and less than one need in all leaves the rest to the base. With one need both kinds agree.

That calibrators correct the routing is the paper's (arXiv 2602.07381); the formulas are ours (docs/method.md).
Shapes: ... any leading dimensions, d size of a query's features (4 hidden sizes), k latent size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.mocae.fractal import Masses
from alignx_ds.mocae.geometry import Geometry
from alignx_ds.mocae.natural import Gaussians, distances
from alignx_ds.mocae.serving import ServingRules, gates_of_needs
from alignx_ds.mocae.settings import GateSettings

TERMS = ("linear", "fractal", "natural", "lexical")  # of every gate; the setting `more` adds others
NEVER = -1e4  # the logit of an expert that has no queries: its gate is zero to the last bit, and no term is infinite


@dataclass(frozen=True)
class Query:
    """A gate's input: `features` [..., d] of the prompt's hidden states, `words` [..., E] its lexical scores, fp32."""

    features: Tensor
    words: Tensor


Calibrator = Callable[[Tensor, Geometry, Query], Tensor]  # whitened latent [..., k], geometry, query -> score [..., E]
CALIBRATORS: dict[str, Calibrator] = {}  # further terms, beside the three that every gate has (docs/extending.md)


@dataclass(frozen=True)
class Decision:
    """A gate's output, fp32: `gates` [..., E] ≥ 0 sum to one, zero but for the chosen experts; `logits` [..., E]."""

    gates: Tensor
    logits: Tensor
    kind: str = "choice"

    def confidence(self) -> Tensor:
        """[...]: the probability of what is most likely: of an expert in a choice; in needs of an axis, or of none."""
        return confidence(self.logits, self.kind)

    def probabilities(self) -> Tensor:
        """softmax(logits) [..., E]: of each expert, if exactly one is right."""
        return self.logits.softmax(-1)

    def needs(self) -> Tensor:
        """[..., E − 1]: of each axis, that the query needs it, whatever else it needs."""
        return need_logits(self.logits).sigmoid()


class Router(nn.Linear):
    """W_r z + b in fp32, also where they are stored in bf16: z [..., k] -> [..., E]."""

    def forward(self, z: Tensor) -> Tensor:
        return linear(z.float(), self.weight.float(), self.bias.float())


class Constants(NamedTuple):
    """What the terms need of the geometry and the settings alone, n terms."""

    geometry: Geometry  # fp32
    masses: Masses
    gaussians: Gaussians
    shift: Tensor  # [n, 1]; a term is (its score − shift)·weight/scale
    weight: Tensor
    scale: Tensor
    present: Tensor  # [E] bool, whether the expert has queries
    otherwise: Tensor  # [E], the terms of one that has none

    @classmethod
    def of(cls, geometry: Geometry, settings: GateSettings) -> Constants:
        g = Geometry.from_tensors({name: tensor.float() for name, tensor in geometry.tensors().items()})
        others = list(settings.more.values())
        one = g.score_shift.new_ones(1)
        rest = one.new_ones(1 + len(others))
        otherwise = torch.full_like(g.present, NEVER)
        if settings.kind == "needs":
            otherwise[0] = 0.0
        return cls(
            geometry=g,
            masses=Masses.of(g.anchors, g.scales),
            gaussians=Gaussians.of(g.means, g.whiteners),
            shift=torch.cat([0 * one, g.score_shift, 0 * rest]).unsqueeze(-1),
            weight=g.centre.new_tensor([1.0, settings.fractal, settings.natural, settings.lexical, *others])[:, None],
            scale=torch.cat([settings.temperature * one, g.score_scale, rest]).unsqueeze(-1),
            present=g.present > 0,
            otherwise=otherwise,
        )


class CalibratedGate(nn.Module):
    """logits = ((W_r z + b)/T + λ₁·ŝ_fractal + λ₂·ŝ_natural + λ₃·ŝ_lexical + …) / T_cal with z = P(features − μ).

    ŝ are scores with mean 0 and standard deviation 1 on the calibration split. T and the λ are settings. The router
    (W_r and b) is zero in a new gate; a run fits it (routing/fit_router.py) and then trains it. The geometry (P, μ and
    the scores' constants) and T_cal, the post-hoc temperature, are fitted buffers. Raises ConfigError for a further
    calibrator that is not in CALIBRATORS.

    `rules` say what serves beside that. A distance from what the gate was fitted on does not make it less sure: on a
    real model's features no such distance finds prompts of unknown sources better than the gate's own confidence
    (docs/results.md).
    """

    calibration_temperature: Tensor

    def __init__(self, geometry: Geometry, settings: GateSettings, rules: ServingRules | None = None) -> None:
        super().__init__()
        for name in settings.more.keys() - CALIBRATORS.keys():
            fix = "add it to CALIBRATORS in alignx_ds/mocae/gate.py (docs/extending.md)"
            raise ConfigError(Problem("gate.more", name, "the name of a calibrator that is there", fix))
        self.settings, self.rules = settings, rules or ServingRules()
        self.router = Router(geometry.latent_size, geometry.num_experts, dtype=torch.float32)
        for parameter in self.router.parameters():
            nn.init.zeros_(parameter)
        for name, tensor in geometry.tensors().items():
            self.register_buffer(name, tensor.float().clone())
        self.register_buffer("calibration_temperature", torch.ones((), dtype=torch.float32))
        self._constants: tuple[object, Constants] | None = None  # with the versions of their sources

    @property
    def geometry(self) -> Geometry:
        """The buffers as a geometry, shared with the gate."""
        return Geometry.from_tensors(dict(self.named_buffers(recurse=False)))

    def constants(self) -> Constants:
        """Computed again only after a change of the geometry or the settings."""
        sources = [(t.data_ptr(), t._version) for t in self._buffers.values() if t is not None], self.settings
        if self._constants is None or self._constants[0] != sources:
            self._constants = (sources, Constants.of(self.geometry, self.settings))
        return self._constants[1]

    def latent(self, query: Query) -> Tensor:
        """z = P(features − μ), [..., k] fp32: the query in the gate's whitened latent space."""
        g = self.constants().geometry
        return (query.features.float() - g.centre) @ g.projection.T

    def distance(self, query: Query) -> Tensor:
        """[...] fp32: how far the query is from the nearest expert's own queries, about 1 for a typical one of them."""
        g = self.constants().geometry
        every = distances(self.latent(query), g.means, g.whiteners)
        return every.masked_fill(g.present == 0, torch.inf).amin(-1)

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the terms of the logits."""
        return (*TERMS, *self.settings.more)

    def parts(self, query: Query) -> dict[str, Tensor]:
        """By name, the terms of the logits before the division by T_cal, each [..., E] fp32.

        In every term an expert without queries of its own has NEVER, so that its gate is zero; in needs, where the
        generalist is what the axes are compared with, its terms are then 0.
        """
        return dict(zip(self.terms, self._parts(query).unbind(0), strict=True))

    def _parts(self, query: Query) -> Tensor:
        """The same as one tensor [n, ..., E]."""
        c, z = self.constants(), self.latent(query)
        scores = [
            self.router(z),
            c.masses.score(z[..., : c.geometry.anchors.shape[-1]], c.geometry.dimensions),
            c.gaussians.score(z, c.geometry.log_volumes),
            query.words.float(),
            *(CALIBRATORS[name](z, c.geometry, query) for name in self.settings.more),
        ]
        terms = (torch.stack(scores, dim=-2) - c.shift) * c.weight / c.scale
        return torch.where(c.present, terms, c.otherwise).movedim(-2, 0)

    def calibrators_alone(self, query: Query) -> Tensor:
        """[..., E] fp32: the sum of all terms but the linear router's."""
        return torch.stack([term for name, term in self.parts(query).items() if name != "linear"]).sum(0)

    def forward(self, query: Query) -> Decision:
        """The decision on a query: all gates in training, otherwise the largest ones, and then the rules.

        In needs this is done to the needs, which are also rounded before the rules, and become gates last.
        """
        logits = self._parts(query).sum(0) / self.calibration_temperature.float()
        kind, k = self.settings.kind, self.settings.chosen(logits.shape[-1])
        every = logits.softmax(-1) if kind == "choice" else need_logits(logits).sigmoid()
        if self.training:
            return Decision(every if kind == "choice" else gates_of_needs(every), logits, kind)
        kept = keep_top(every, k) if kind == "choice" else round_needs(keep_largest(every, k), self.settings.rounding)
        if self.rules.change:
            apply = self.rules.on_gates if kind == "choice" else self.rules.on_needs
            kept = apply(kept, confidence(logits, kind), self.geometry.present)
        return Decision(kept if kind == "choice" else gates_of_needs(kept), logits, kind)


def keep_top(gates: Tensor, k: int) -> Tensor:
    """The k largest gates of each row, divided by their sum, and zero for the others: [..., E] -> [..., E]."""
    if k >= gates.shape[-1]:
        return gates
    kept = keep_largest(gates, k)
    return kept / kept.sum(-1, keepdim=True)


def need_logits(logits: Tensor) -> Tensor:
    """[..., E] -> [..., E − 1]: the log-odds that each axis is needed, its logit less the generalist's."""
    return logits[..., 1:] - logits[..., :1]


def confidence(logits: Tensor, kind: str) -> Tensor:
    """Logits [..., E] -> [...]: `Decision.confidence`."""
    if kind == "choice":
        return logits.softmax(-1).amax(-1)
    odds = need_logits(logits)
    none = logsigmoid(-odds).sum(-1).exp()
    return torch.maximum(odds.sigmoid().amax(-1), none)


def keep_largest(values: Tensor, k: int) -> Tensor:
    """The k largest of each row as they are, and zero for the others: [..., N] -> [..., N]."""
    if k >= values.shape[-1]:
        return values
    best = values.topk(k, dim=-1)
    return torch.zeros_like(values).scatter(-1, best.indices, best.values)


def round_needs(needs: Tensor, rounding: float) -> Tensor:
    """Needs [..., A], those below `rounding`, at most ½, as 0, and those above 1 − `rounding` as 1.

    Most prompts need one axis; so rounded, its expert alone serves them, at a choice's cost. At ½ no prompt has a part
    of an expert: on a real model such parts refuse less often than whole experts on the same prompts (docs/results.md).
    """
    needs = torch.where(needs < rounding, 0.0, needs)
    return torch.where(needs > 1 - rounding, 1.0, needs)
