"""Assemble the aligned model from the base model, the experts' factors and what was fitted to the calibrators."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.user_turn import user_turn
from alignx_ds.mocae.experts import ATTENTION, Factors, align_ranks
from alignx_ds.mocae.geometry import Geometry
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.modeling import AlignXConfig, AlignXForCausalLM, LayerParts, Placement
from alignx_ds.mocae.routing_state import SUMMARIES
from alignx_ds.models.backbone import load_backbone
from alignx_ds.models.base import BaseModel

ExpertFactors = dict[int, list[Factors]]  # by AlignX layer: one per axis, in the config's order


@dataclass(frozen=True)
class FittedCalibrators:
    """What is fitted before training: the geometries of the gates and of the outputs by layer, the lexicon's state, and
    the states of the linear routers by the gates' layers.

    `outputs` is empty where `gate.output_latent` is 0, and `routers` while they are being fitted.
    """

    gates: dict[int, Geometry]
    outputs: dict[int, Geometry]
    lexicon: dict[str, Tensor]
    routers: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """By "kind.layer.name", for one file; `from_tensors` reads it."""
        found = {f"words.{name}": tensor.contiguous() for name, tensor in self.lexicon.items()}
        for kind in ("gates", "outputs"):
            for layer, geometry in getattr(self, kind).items():
                found |= geometry.tensors(f"{kind}.{layer}.")
        for layer, router in self.routers.items():
            found |= {f"routers.{layer}.{name}": tensor.contiguous() for name, tensor in router.items()}
        return found

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> FittedCalibrators:
        def geometries(kind: str) -> dict[int, Geometry]:
            layers = {int(name.split(".")[1]) for name in tensors if name.startswith(f"{kind}.")}
            return {layer: Geometry.from_tensors(tensors, f"{kind}.{layer}.") for layer in sorted(layers)}

        lexicon = {name.removeprefix("words."): t for name, t in tensors.items() if name.startswith("words.")}
        routers: dict[int, dict[str, Tensor]] = {}
        for name, tensor in sorted(tensors.items()):
            if name.startswith("routers."):
                _, layer, part = name.split(".")
                routers.setdefault(int(layer), {})[part] = tensor
        return cls(geometries("gates"), geometries("outputs"), lexicon, routers)


def assemble(
    config: RunConfig,
    base: BaseModel,
    factors: ExpertFactors,
    fitted: FittedCalibrators | None,
    placement: Placement | None,
) -> AlignXForCausalLM:
    """The aligned model, on the CPU in the run's dtype.

    With a `placement` its experts are spread over the ranks, without one all of them are here (the fused path).
    Without `fitted` its calibrators are blank: good for collecting the features that they are fitted to. A router
    that is not fitted is zero.
    """
    model_config, backbone = aligned_config(config, base, factors), load_backbone(base)
    parts = {}
    for layer in base.layers:
        generalist = base.table.generalist(backbone, layer, model_config.ranks)
        experts = align_ranks([generalist, *factors[layer]])
        has_gate, has_calibration = model_config.gate_layer(layer) == layer, config.gate.output_latent > 0
        if fitted is None:
            hidden = model_config.text_config.hidden_size
            gate = _blank(config, SUMMARIES * hidden, config.gate.latent)
            output = _blank(config, hidden, config.gate.output_latent) if has_calibration else None
        else:
            gate = fitted.gates[model_config.gate_layer(layer)]
            output = fitted.outputs[layer] if has_calibration else None
        parts[layer] = LayerParts(experts, gate if has_gate else None, output)
    model = AlignXForCausalLM(model_config, backbone=backbone, parts=parts, placement=placement)
    if fitted is not None:
        model.lexicon.load_state_dict(fitted.lexicon)
        for layer, router in fitted.routers.items():
            gates_of(model)[layer].router.load_state_dict(router)
    return model


def aligned_config(config: RunConfig, base: BaseModel, factors: ExpertFactors) -> AlignXConfig:
    """Every projection has one rank in all layers: the greatest that any expert needs there."""
    every = [f for experts in factors.values() for f in experts]
    ranks = {p: max(f.rank(p) for f in every) for p in base.table.projections}
    attention = {p: max((f.rank(p) for f in every if p in f.down), default=0) for p in ATTENTION}
    return AlignXConfig(
        text_config=base.config,
        experts=config.expert_names,
        layers=base.layers,
        ranks=ranks,
        gate=config.gate,
        user_turn=user_turn(base.tokenizer),
        floors=floors(config),
        attention_ranks={p: rank for p, rank in attention.items() if rank},
        fused=base.fused,
    )


def floors(config: RunConfig) -> dict[str, float]:
    """The least gates, or needs, by axis, of those that have one."""
    return {name: axis.floor for name, axis in config.axes.items() if axis.floor > 0}


def _blank(c: RunConfig, d: int, latent: int) -> Geometry:
    return Geometry.blank(d, latent, c.gate.fractal_dimensions, len(c.expert_names), c.gate.anchors, c.gate.scales)
