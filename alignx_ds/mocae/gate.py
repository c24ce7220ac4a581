"""The calibrated gate: a linear router corrected by the fractal, natural and lexical calibrators, all in fp32.

That calibrators correct the routing is the paper's (arXiv 2602.07381); the formulas are ours (docs/method.md).
Shapes: ... any leading dimensions, d size of a query's features (4 hidden sizes), k latent size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.mocae.fractal import fractal_score
from alignx_ds.mocae.geometry import Geometry
from alignx_ds.mocae.natural import natural_score
from alignx_ds.mocae.settings import GateSettings

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
    """A gate's output, fp32: `gates` [..., E] sum to one and are zero but for the chosen experts; `logits` [..., E]."""

    gates: Tensor
    logits: Tensor

    def probabilities(self) -> Tensor:
        """softmax(logits) [..., E], the gates before the choice."""
        return self.logits.softmax(-1)


class Router(nn.Linear):
    """W_r z in fp32, also where the weight is stored in bf16: z [..., k] -> [..., E]."""

    def forward(self, z: Tensor) -> Tensor:
        return linear(z.float(), self.weight.float())


class CalibratedGate(nn.Module):
    """logits = ((W_r z)/T + λ₁·ŝ_fractal + λ₂·ŝ_natural + λ₃·ŝ_lexical + …) / T_cal with z = P(features − μ).

    ŝ are scores with mean 0 and standard deviation 1 on the calibration split. T and the λ are settings. W_r is trained
    and starts at zero; the geometry (P, μ and the scores' constants) and T_cal, the post-hoc temperature, are fitted
    buffers. Raises ConfigError for a further calibrator that is not in CALIBRATORS.
    """

    calibration_temperature: Tensor

    def __init__(self, geometry: Geometry, settings: GateSettings) -> None:
        super().__init__()
        for name in settings.more.keys() - CALIBRATORS.keys():
            fix = "add it to CALIBRATORS in alignx_ds/mocae/gate.py (docs/extending.md)"
            raise ConfigError(Problem("gate.more", name, "the name of a calibrator that is there", fix))
        self.settings = settings
        self.router = Router(geometry.latent_size, geometry.num_experts, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.router.weight)
        for name, tensor in geometry.tensors().items():
            self.register_buffer(name, tensor.float().clone())
        self.register_buffer("calibration_temperature", torch.ones((), dtype=torch.float32))

    @property
    def geometry(self) -> Geometry:
        """The buffers as a geometry, shared with the gate."""
        return Geometry.from_tensors(dict(self.named_buffers(recurse=False)))

    def parts(self, query: Query) -> dict[str, Tensor]:
        """By name, the terms of the logits before the division by T_cal, each [..., E] fp32.

        In every term an expert without queries of its own has NEVER, so that its gate is zero.
        """
        g = self.geometry
        z = (query.features.float() - g.centre.float()) @ g.projection.float().T
        fractal = fractal_score(
            z[..., : g.anchors.shape[-1]], g.anchors.float(), g.scales.float(), g.dimensions.float()
        )
        natural = natural_score(z, g.means.float(), g.whiteners.float(), g.log_volumes.float())
        terms = {
            "linear": self.router(z) / self.settings.temperature,
            "fractal": self.settings.fractal * (fractal - g.score_shift[0]) / g.score_scale[0],
            "natural": self.settings.natural * (natural - g.score_shift[1]) / g.score_scale[1],
            "lexical": self.settings.lexical * query.words.float(),
        }
        terms |= {name: weight * CALIBRATORS[name](z, g, query) for name, weight in self.settings.more.items()}
        return {name: term.masked_fill(g.present == 0, NEVER) for name, term in terms.items()}

    def forward(self, query: Query) -> Decision:
        """The decision on a query: in training all experts keep their gates, otherwise the `top_k` largest."""
        logits = torch.stack(list(self.parts(query).values())).sum(0) / self.calibration_temperature.float()
        k = logits.shape[-1] if self.training else self.settings.top_k
        return Decision(gates=keep_top(logits.softmax(-1), k), logits=logits)


def keep_top(gates: Tensor, k: int) -> Tensor:
    """The k largest gates of each row, divided by their sum, and zero for the others: [..., E] -> [..., E]."""
    if k >= gates.shape[-1]:
        return gates
    best = gates.topk(k, dim=-1)
    return torch.zeros_like(gates).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
