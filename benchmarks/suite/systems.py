"""The systems under test, as whole models with random weights: same backbone, every layer's FFN replaced.

The time and memory of a model do not depend on the values of its weights, so random ones suffice. Systems of one run
share the tensors that are equal in them: the base's weights, and the full copies of its FFNs. These are larger than any
cache, so sharing saves memory and leaves the times as they are.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from alignx_ds.baselines.fusion import H3FUSION, TRINITYX, FullExperts, FusionSettings, replace_ffns
from alignx_ds.mocae.backbones import backbone_of
from alignx_ds.mocae.experts import PROJECTIONS, Factors, FeedForward
from alignx_ds.mocae.fused import FusedMixture
from alignx_ds.mocae.geometry import Geometry
from alignx_ds.mocae.layer import alignx_layers
from alignx_ds.mocae.modeling import AlignXConfig, AlignXForCausalLM, LayerParts, Placement
from alignx_ds.mocae.routing_state import SUMMARIES
from alignx_ds.mocae.settings import GateSettings
from suite.record import dtype_of
from suite.shapes import config_of

AXES = 3
FRACTAL_DIMENSIONS, ANCHORS, SCALES = 4, 64, 5


@dataclass(frozen=True)
class Setting:
    """What all systems of a benchmark share."""

    config: PreTrainedConfig
    device: str
    dtype: torch.dtype
    rank: int = 64
    latent: int = 256
    output_latent: int = 32

    @classmethod
    def of(cls, args: argparse.Namespace, layers: int = 0) -> Setting:
        """From the options of `record.parser`; `layers` replaces theirs unless it is 0."""
        config = config_of(args.shape, layers or args.layers, args.vocabulary)
        return cls(config, args.device, dtype_of(args), args.rank)


@dataclass(frozen=True)
class System:
    """One or more models that answer a prompt together; `prepare` switches shared models to this system's settings."""

    name: str
    models: list[PreTrainedModel]
    experts: int = 1  # whose factors a row of AlignX needs
    prepare: Callable[[], None] = field(default=lambda: None)


class StockMoE(nn.Module):
    """DeepSpeed's own MoE layer with its TopKGate, of full FFNs, without dropping."""

    needs_host_sync = True  # the host reads how many tokens the fullest expert has

    def __init__(self, base: FeedForward) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.moe = MoE(base.gate.in_features, _Copy(base), AXES, k=2, drop_tokens=False, min_capacity=0)
        self.moe.to(base.gate.weight.device)
        self.moe.deepspeed_moe.gate.wg.float()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.moe(x)[0]
        return y


class _Copy(nn.Module):
    """A full FFN as DeepSpeed deep-copies it."""

    def __init__(self, base: FeedForward) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({p: base.projection(p) for p in PROJECTIONS})
        self.activation = base.activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers["down"](self.activation(self.layers["gate"](x)) * self.layers["up"](x))
        return y


@contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def dense(s: Setting) -> PreTrainedModel:
    with torch.device(s.device), _dtype(s.dtype):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(s.config, dtype=s.dtype)
    return model.eval().requires_grad_(False)


def twin(s: Setting, base: PreTrainedModel | None) -> PreTrainedModel:
    """A new model that shares the base's weights; without a base, one with weights of its own."""
    if base is None:
        return dense(s)
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def alignx(
    s: Setting,
    base: PreTrainedModel | None = None,
    placement: Placement | None = None,
    lowest: int = 0,
    **gate: Any,
) -> PreTrainedModel:
    """AlignX layers from the `lowest` on; fused, or with experts spread over DeepSpeed's expert-parallel groups."""
    backbone, table = twin(s, base), backbone_of(s.config.model_type)
    layers = list(range(lowest, s.config.num_hidden_layers))
    config = AlignXConfig(
        text_config=s.config,
        experts=["generalist", *(f"axis {i}" for i in range(AXES))],
        layers=layers,
        ranks=dict.fromkeys(PROJECTIONS, s.rank),
        gate=GateSettings(
            latent=s.latent,
            output_latent=s.output_latent,
            fractal_dimensions=FRACTAL_DIMENSIONS,
            anchors=ANCHORS,
            scales=SCALES,
            **gate,
        ),
    )
    d, parts = s.config.hidden_size, {}
    with torch.device(s.device):
        for layer in layers:
            ffn = table.view(table.ffn_of(backbone, layer))
            experts = [Factors.zeros(ffn, config.ranks), *(_random_factors(ffn, s) for _ in range(AXES))]
            gate = _random_geometry(SUMMARIES * d, s.latent) if layer == lowest else None
            output = _random_geometry(d, s.output_latent) if s.output_latent else None
            parts[layer] = LayerParts(experts, gate, output)
        model = AlignXForCausalLM(config, backbone=backbone, parts=parts, placement=placement)
        for made in alignx_layers(model):
            if made.calibration is not None:
                nn.init.normal_(made.calibration.reinjection, std=1e-3)
            if made.gate is not None:
                nn.init.normal_(made.gate.router.weight, std=0.1)
    for buffer in model.lexicon.buffers():
        buffer.normal_().abs_()
    return model.eval().requires_grad_(False).to(s.device)


def _random_factors(ffn: FeedForward, s: Setting) -> Factors:
    def matrix(rows: int, columns: int) -> Tensor:
        return 0.01 * torch.randn(rows, columns, dtype=s.dtype)

    weights = {p: ffn.projection(p) for p in PROJECTIONS}
    return Factors(
        down={p: matrix(s.rank, w.in_features) for p, w in weights.items()},
        up={p: matrix(w.out_features, s.rank) for p, w in weights.items()},
    )


def _random_geometry(d: int, latent: int) -> Geometry:
    blank = Geometry.blank(d, latent, FRACTAL_DIMENSIONS, AXES + 1, ANCHORS, SCALES)
    moved = {name: torch.randn(getattr(blank, name).shape) for name in ("means", "anchors")}
    return Geometry.from_tensors({**blank.tensors(), **moved, "projection": torch.randn(latent, d) / d**0.5})


def fusion(s: Setting, settings: FusionSettings, base: PreTrainedModel | None = None) -> PreTrainedModel:
    """H3Fusion or TrinityX: three full FFN copies and a token gate in every layer."""
    model = twin(s, base)

    def block(layer: int, ffn: FeedForward) -> FullExperts:
        return FullExperts([ffn] * AXES, settings)

    with torch.device(s.device):
        replace_ffns(model, backbone_of(s.config.model_type), list(range(s.config.num_hidden_layers)), block)
    return model.eval().requires_grad_(False)


def stock_moe(s: Setting, base: PreTrainedModel | None = None) -> PreTrainedModel:
    model = twin(s, base)
    layers = list(range(s.config.num_hidden_layers))
    replace_ffns(model, backbone_of(s.config.model_type), layers, lambda layer, ffn: StockMoE(ffn))
    return model.eval().requires_grad_(False)


def systems(s: Setting, names: list[str]) -> list[System]:
    """The named systems, in this order; systems that differ only in settings share one model."""
    base = dense(s)
    built: dict[str, list[PreTrainedModel]] = {}

    def once(key: str, build: Callable[[], list[PreTrainedModel]]) -> list[PreTrainedModel]:
        if key not in built:
            built[key] = build()
        return built[key]

    made = []
    for name in names:
        kind, experts, prepare = KINDS[name]
        models = once(kind, lambda kind=kind: BUILD[kind](s, base))  # type: ignore[misc]
        made.append(System(name, models, experts, lambda models=models, prepare=prepare: prepare(models)))  # type: ignore[misc]
    return made


def _top_k(k: int) -> Callable[[list[PreTrainedModel]], None]:
    def prepare(models: list[PreTrainedModel]) -> None:
        for layer in alignx_layers(models[0]):
            layer.settings = GateSettings(top_k=k)
            if layer.gate is not None:
                layer.gate.settings = layer.settings

    return prepare


def _needs(axes: int, combine: str) -> Callable[[list[PreTrainedModel]], None]:
    """Every prompt needs one axis, and no other, or several to 0.73 each. The gate's other terms have no weight."""

    def prepare(models: list[PreTrainedModel]) -> None:
        for layer in alignx_layers(models[0]):
            assert isinstance(layer.mixture, FusedMixture)
            layer.mixture.merge = combine == "weights"
            if layer.gate is not None:
                layer.gate.router.weight.zero_()
                layer.gate.router.bias.fill_(-10.0)
                layer.gate.router.bias[0] = 0.0
                layer.gate.router.bias[1 : 1 + axes] = 10.0 if axes == 1 else 1.0

    return prepare


def _full_experts(settings: FusionSettings, grouped: bool) -> Callable[[list[PreTrainedModel]], None]:
    """H3Fusion and TrinityX have the same FFNs; they differ in how many of them a token uses."""

    def prepare(models: list[PreTrainedModel]) -> None:
        for module in models[0].modules():
            if isinstance(module, FullExperts):
                module.settings, module.grouped = settings, grouped
                module.top_k = min(settings.top_k, module.num_experts) or module.num_experts
                scales = module.__dict__.setdefault(
                    "kept_scales", nn.Parameter(torch.ones_like(module.gate.weight[:, 0]))
                )
                module.gamma = scales if settings.scaled else None

    return prepare


def _nothing(models: list[PreTrainedModel]) -> None:
    pass


BUILD: dict[str, Callable[..., list[Any]]] = {
    "dense": lambda s, base=None: [base if base is not None else dense(s)],
    "alignx": lambda s, base=None: [alignx(s, base)],
    "needs": lambda s, base=None: [alignx(s, base, kind="needs", fractal=0.0, natural=0.0, lexical=0.0)],
    "h3fusion": lambda s, base=None: [fusion(s, H3FUSION, base)],
    "trinityx": lambda s, base=None: [fusion(s, TRINITYX, base)],
    "stock": lambda s, base=None: [stock_moe(s, base)],
    "ensemble": lambda s, base=None: [twin(s, base) for _ in range(AXES)],
}
NEEDS = {
    f"AlignX, {number} need{'s' * (axes > 1)}, {combine}": ("needs", axes, _needs(axes, combine))
    for number, axes in (("one", 1), ("two", 2), ("three", 3))
    for combine in ("outputs", "weights")
}
KINDS: dict[str, tuple[str, int, Callable[[list[PreTrainedModel]], None]]] = {
    "dense base": ("dense", 0, _nothing),
    "AlignX": ("alignx", 1, _top_k(1)),
    "AlignX, 2 experts": ("alignx", 2, _top_k(2)),
    "AlignX, all experts": ("alignx", AXES, _top_k(AXES + 1)),
    **NEEDS,
    "H3Fusion, loop": ("h3fusion", 0, _full_experts(H3FUSION, False)),
    "H3Fusion, grouped": ("h3fusion", 0, _full_experts(H3FUSION, True)),
    "TrinityX": ("h3fusion", 0, _full_experts(TRINITYX, True)),
    "TrinityX, top-1": ("h3fusion", 0, _full_experts(replace(TRINITYX, top_k=1), True)),  # not published
    "DeepSpeed MoE": ("stock", 0, _nothing),
    "ensemble of 3": ("ensemble", 0, _nothing),
}
