"""The module names of every supported architecture. No other file names a backbone's modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from transformers import PreTrainedConfig

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.mocae.experts import ATTENTION, PROJECTIONS, Factors, FeedForward

THIS_FILE = "alignx_ds/mocae/backbones.py"
FIX = "correct the entry of the model's architecture in BACKBONES"
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Backbone:
    """Names of modules: of `layers` within the causal LM, of `ffn` and `attention` within a decoder layer, of the rest
    within these two.

    It describes any architecture whose FFN is down(activation(gate(x)) * up(x)) with linear projections. Their biases,
    if any, are shared by the experts. What surrounds the FFN (attention, norms, embeddings) does not matter, except for
    experts that change the attention's projections. Where a norm follows the FFN, as in Gemma 2 and OLMo 2, the output
    calibration comes before that norm.

    Where the FFN is a mixture of experts already, `expert_width` is set, and `gate` to `activation` have no meaning:
    router and experts stay as they are, and our experts change projections of the attention alone.
    """

    layers: str = "model.layers"
    ffn: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    expert_width: str = ""  # of each expert of an FFN that is a mixture, by its name in the model's config
    attention: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    same_as: str = ""  # in FUSED: the architecture of BACKBONES that computes the same

    @property
    def projections(self) -> tuple[str, ...]:
        """Those of the FFN that experts change: none where the FFN is a mixture of experts already."""
        return () if self.expert_width else PROJECTIONS

    def active_width(self, config: PreTrainedConfig) -> int:
        """The FFN size f that a token goes through: in a mixture, of all experts that its router picks."""
        if self.expert_width:
            return int(config.num_experts_per_tok * getattr(config, self.expert_width))
        return int(config.intermediate_size)

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """All decoder layers, lowest first. Raises ConfigError if the entry does not fit the model."""
        return _submodule(model, self.layers, nn.ModuleList)

    def ffn_of(self, model: nn.Module, layer: int) -> nn.Module:
        """The FFN of a decoder layer. Raises ConfigError if the entry does not fit the model."""
        return _submodule(self.decoder_layers(model)[layer], self.ffn, nn.Module)

    def view(self, ffn: nn.Module) -> FeedForward:
        """The parts of an FFN, shared with it. Raises ConfigError if the entry does not fit the model."""
        gate, up, down = (_submodule(ffn, name, nn.Linear) for name in (self.gate, self.up, self.down))
        return FeedForward(gate, up, down, _submodule(ffn, self.activation, nn.Module))

    def generalist(self, model: nn.Module, layer: int, ranks: dict[str, int]) -> Factors:
        """The factors of the expert that changes nothing (Factors.zeros). Raises ConfigError as above."""
        return Factors.zeros(self.view(self.ffn_of(model, layer)), ranks) if self.projections else Factors({}, {})

    def owner_of(self, model: nn.Module, layer: int, projection: str) -> nn.Module:
        """The FFN or the attention of a decoder layer, whichever has the projection. Raises ConfigError as above."""
        if projection in self.projections:
            return self.ffn_of(model, layer)
        return _submodule(self.decoder_layers(model)[layer], self.attention, nn.Module)

    def linear(self, model: nn.Module, layer: int, projection: str) -> nn.Linear:
        """A projection of a decoder layer, one of PROJECTIONS or ATTENTION. Raises ConfigError as above."""
        return _submodule(self.owner_of(model, layer, projection), getattr(self, projection), nn.Linear)

    def sharing(self, module: str) -> list[str]:
        """The projections in the module of this name; where several are, their weight's rows have this order."""
        return [p for p in (*self.projections, *ATTENTION) if getattr(self, p) == module]

    def weight_name(self, layer: int, projection: str) -> str:
        """The key of a projection's weight [m, n] in the backbone's state dict."""
        assert projection in (*self.projections, *ATTENTION)
        part = self.ffn if projection in PROJECTIONS else self.attention
        return f"{self.layers}.{layer}.{part}.{getattr(self, projection)}.weight"


BACKBONES: dict[str, Backbone] = {  # by the `model_type` of the config
    "llama": Backbone(),  # DeepSeek-LLM too
    "mistral": Backbone(),
    "gemma": Backbone(),
    "gemma2": Backbone(),
    "gemma3_text": Backbone(),
    "olmo2": Backbone(),
    "olmo3": Backbone(),
    "qwen2": Backbone(),
    "qwen3": Backbone(),
    "smollm3": Backbone(),
    "mixtral": Backbone(expert_width="intermediate_size"),
    "olmoe": Backbone(expert_width="intermediate_size"),
    "qwen3_moe": Backbone(expert_width="moe_intermediate_size"),
}
FUSED: dict[str, Backbone] = {  # whose checkpoints have one weight for several projections (models/fused.py)
    "phi3": Backbone(  # Phi-4 too
        gate="gate_up_proj", up="gate_up_proj", q="qkv_proj", k="qkv_proj", v="qkv_proj", same_as="mistral"
    ),
}


def backbone_of(model_type: str) -> Backbone:
    """The entry of a `model_type`. Raises ConfigError, with the known architectures, where there is none."""
    if model_type not in BACKBONES:
        known = ", ".join(sorted((*BACKBONES, *FUSED)))
        fix = (
            f"choose such a model, or add an entry for {model_type!r} to BACKBONES in {THIS_FILE}: the names of its "
            "decoder layers, their FFN, and the FFN's gate, up and down projections and activation; docs/extending.md "
            "says what does not fit, and what a mixture of experts needs"
        )
        raise ConfigError(Problem("model.path", model_type, f"a model whose architecture is one of {known}", fix))
    return BACKBONES[model_type]


def _submodule(parent: nn.Module, name: str, kind: type[Module]) -> Module:
    """The submodule of this name and kind. Raises ConfigError, with the names that there are, if there is none."""
    owner = type(parent).__name__
    try:
        found = parent.get_submodule(name)
    except AttributeError:
        children = ", ".join(child for child, _ in parent.named_children())
        allowed = f"the name of a {kind.__name__} in {owner}, which has {children}"
        raise ConfigError(Problem(THIS_FILE, f"{owner}.{name}", allowed, FIX)) from None
    if not isinstance(found, kind):
        allowed = f"the name of a {kind.__name__} in {owner}, not of a {type(found).__name__}"
        raise ConfigError(Problem(THIS_FILE, f"{owner}.{name}", allowed, FIX))
    return found
