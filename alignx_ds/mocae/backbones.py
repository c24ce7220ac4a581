"""Where each supported architecture keeps what AlignX touches. The one place that knows module names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.mocae.experts import PROJECTIONS, FeedForward


@dataclass(frozen=True)
class Backbone:
    """Names of the modules: `layers` from the causal LM, `ffn` from a layer, the rest from the FFN."""

    layers: str = "model.layers"
    ffn: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def ffn_of(self, model: nn.Module, layer: int) -> nn.Module:
        return self.decoder_layers(model)[layer].get_submodule(self.ffn)

    def view(self, ffn: nn.Module) -> FeedForward:
        gate, up, down = (ffn.get_submodule(name) for name in (self.gate, self.up, self.down))
        assert isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
        return FeedForward(gate, up, down, ffn.get_submodule(self.activation))

    def weight_name(self, layer: int, projection: str) -> str:
        """The projection's key in the backbone's state dict."""
        assert projection in PROJECTIONS
        return f"{self.layers}.{layer}.{self.ffn}.{getattr(self, projection)}.weight"


BACKBONES: dict[str, Backbone] = {"llama": Backbone(), "mistral": Backbone()}


def backbone_of(model_type: str) -> Backbone:
    """The table's entry; raises ConfigError that lists the known architectures."""
    if model_type not in BACKBONES:
        known = ", ".join(sorted(BACKBONES))
        mend = "choose a model of a known architecture, or add its module names to alignx_ds/mocae/backbones.py"
        raise ConfigError(Problem("model.path", model_type, f"a model whose architecture is one of {known}", mend))
    return BACKBONES[model_type]
