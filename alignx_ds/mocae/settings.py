"""The settings of the gates and of the output calibrations, with their defaults and bounds."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from alignx_ds.mocae.bounds import NonNegativeFloat, NonNegativeInt, OneOf, PositiveFloat, PositiveInt, Range

Kind = Annotated[str, OneOf(("choice", "needs"))]
Combine = Annotated[str, OneOf(("outputs", "weights"))]
Probability = Annotated[float, Range(least=0, most=1)]
Rounding = Annotated[float, Range(least=0, most=0.5, fix="at 0.5 every need is whole or none already")]
Scope = Annotated[str, OneOf(("shared", "per_layer"))]
Scales = Annotated[
    int, Range(least=2, most=32, fix="a slope over scales needs two of them, and each doubles the kernel's width")
]

ALL = "all"  # gate.unsure: every axis to the same share


@dataclass
class GateSettings:
    """Everything that determines the shapes and the terms of a gate and of an output calibration.

    They are keys of a recipe's `gate` section, and of `gate` in an aligned model's config.json.
    """

    fractal: NonNegativeFloat = 0.6  # λ₁
    natural: NonNegativeFloat = 0.4  # λ₂
    lexical: NonNegativeFloat = 1.0  # λ₃, weight of the lexical score; 0 is the paper's gate
    temperature: PositiveFloat = 1.0  # of the linear router's softmax
    kind: Kind = "choice"  # experts compete for a query, or each axis has its own probability of being needed by it
    combine: Combine = "outputs"  # mix the experts' outputs, or their weights, which costs one activation for all
    top_k: NonNegativeInt = 0  # experts that serve a query; 0: one in a choice, all axes that are needed in needs
    rounding: Rounding = 0.01  # in needs: a need below it serves as none, one above 1 − it as whole
    unsure: str = ""  # serves what the gate is unsure of: "generalist", an axis, or "all" axes; empty: as decided
    unsure_below: Probability = 0.5  # the confidence below which the gate is unsure
    more: dict[str, NonNegativeFloat] = field(default_factory=dict)  # weights of further calibrators, by their names
    scope: Scope = "shared"  # one decision at the lowest AlignX layer, or one per layer
    latent: PositiveInt = 64  # k, dimensions of a gate's whitened latent space
    output_latent: NonNegativeInt = 32  # of an output calibration's; it gained nothing (docs/results.md); 0: off
    fractal_dimensions: PositiveInt = 4  # leading latent dimensions that the fractal score looks at
    anchors: PositiveInt = 64  # k-means anchors per expert
    scales: Scales = 5  # kernel widths: ε·2, ε·4, …

    def chosen(self, experts: int) -> int:
        """How many gates are kept when a query is served: of all experts in a choice, of the axes in needs."""
        return min(self.top_k or experts - 1, experts - 1) if self.kind == "needs" else self.top_k or 1

    def as_dict(self) -> dict[str, Any]:
        """These settings alone, without what a subclass adds."""
        return {f.name: getattr(self, f.name) for f in fields(GateSettings)}
