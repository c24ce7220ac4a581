"""The aligned model: a Hugging Face causal LM in which AlignX layers take the place of chosen FFNs.

Shapes: B rows, T tokens, d hidden size, V vocabulary size, E experts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from alignx_ds.mocae.attention import RoutedLinear, padded
from alignx_ds.mocae.backbones import backbone_of
from alignx_ds.mocae.experts import Factors
from alignx_ds.mocae.fused import FusedMixture, stack
from alignx_ds.mocae.gate import CalibratedGate
from alignx_ds.mocae.geometry import Geometry
from alignx_ds.mocae.kv_cache import kv_cache
from alignx_ds.mocae.layer import AlignXLayer, alignx_layers, output_calibrations
from alignx_ds.mocae.lexical import Lexicon
from alignx_ds.mocae.output_calibration import OutputCalibration
from alignx_ds.mocae.routing_state import SUMMARIES, ForwardPass, Routing, unpadded
from alignx_ds.mocae.serving import ServingRules
from alignx_ds.mocae.settings import GateSettings
from alignx_ds.mocae.turns import from_column, query_mask, turn_start
from alignx_ds.mocae.unchanged import UnchangedFfn

if TYPE_CHECKING:
    from alignx_ds.mocae.parallel import ParallelMixture


class AlignXConfig(PreTrainedConfig):
    """Everything that is needed to build an aligned model's modules before its weights are loaded."""

    model_type = "alignx"
    sub_configs: ClassVar[dict[str, type]] = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        experts: list[str] | None = None,
        layers: list[int] | None = None,
        ranks: dict[str, int] | None = None,
        gate: GateSettings | dict[str, Any] | None = None,
        user_turn: list[int] | None = None,
        floors: dict[str, float] | None = None,
        attention_ranks: dict[str, int] | None = None,
        fused: str = "",
        **kwargs: Any,
    ) -> None:
        """`user_turn` are the tokens that begin a user turn; without them the whole prompt is the gates' query. `fused`
        is the architecture of the base model's own files, where it is one of FUSED (backbones.py).
        """
        # A copy: transformers resets the attention implementation of a nested config, which a live model may share.
        given = AutoConfig.for_model(**text_config) if isinstance(text_config, dict) else copy.deepcopy(text_config)
        self.text_config: Any = given
        self.experts = experts or []
        self.layers = layers or []
        self.ranks = ranks or {}
        self.attention_ranks = attention_ranks or {}  # by projection that some expert changes; empty: none does
        self.fused = fused
        self.user_turn = list(user_turn or [])
        self.floors = floors or {}  # least gates when it serves, or least needs, by axis
        self.gate = (gate if isinstance(gate, GateSettings) else GateSettings(**(gate or {}))).as_dict()
        if self.text_config is not None:
            self.text_config._name_or_path = ""  # often a path of the machine that made the model
            self.text_config.return_dict = True  # `forward` reads the backbone's output by name
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
                kwargs.setdefault(name, getattr(self.text_config, name))
        super().__init__(**kwargs)

    def gate_settings(self) -> GateSettings:
        """The settings of all gates and output calibrations."""
        return GateSettings(**self.gate)

    def serving_rules(self) -> ServingRules:
        """What serves beside what the gates decide. Raises ValueError for a name that no expert has."""
        return ServingRules.of(self.gate_settings(), self.floors, self.experts)

    def changed_attention(self) -> list[int]:
        """The layers in which experts change the attention's projections: those above the gate, if any."""
        return self.layers[1:] if self.attention_ranks else []

    def gate_layer(self, layer: int) -> int:
        """The layer whose gate decides for `layer`: the lowest AlignX layer, or the layer itself."""
        return self.layers[0] if self.gate["scope"] == "shared" else layer


LOST_ROUTING = (
    "tokens came before these, but the routing of their prompt, which is kept with the KV cache, is lost: "
    "start with an empty cache, or install the release of transformers that requirements.lock names"
)


@dataclass(frozen=True)
class LayerParts:
    """The parts of one AlignX layer: experts by global id, the geometries of its gate and of its output, if any."""

    experts: list[Factors]
    gate: Geometry | None
    output: Geometry | None


@dataclass(frozen=True)
class Placement:
    """How the experts are spread over ranks: how many ranks share them, and which of these this rank is."""

    ep_size: int
    ep_rank: int


class AlignXForCausalLM(PreTrainedModel, GenerationMixin):
    """A backbone with AlignX layers. Pass `prompt_mask` where `input_ids` hold an answer too (training, scoring).

    Without it the whole input but its padding is the prompt, as in generation. The gates decide from the prompt's last
    user turn, which they find by `config.user_turn`, and the routing is kept with the KV cache.

    A later pass on this cache that brings a user turn is routed anew, in the rows that have one. The tokens that begin
    the turn have to be in that pass, with others after them or before. The keys and values of the turns before stay as
    their own experts made them. So the logits are those of one full forward pass within a turn, but not across turns
    with different experts. The decision of a shared gate is the same in both.
    """

    config_class = AlignXConfig
    base_model_prefix = "backbone"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: AlignXConfig,
        *,
        backbone: PreTrainedModel | None = None,
        parts: dict[int, LayerParts] | None = None,
        placement: Placement | None = None,
    ) -> None:
        super().__init__(config)
        self.backbone = backbone if backbone is not None else AutoModelForCausalLM.from_config(config.text_config)
        self.placement = placement
        self.forward_pass = ForwardPass()
        self.lexicon = Lexicon(len(config.experts))
        table = backbone_of(config.text_config.model_type)
        parts = parts or self._blank_parts()
        assert sorted(parts) == sorted(config.layers), "every AlignX layer needs its parts, and no other"
        for index in config.layers:
            ffn = table.ffn_of(self.backbone, index)
            layer = self._build_layer(index, ffn, parts[index], placement)
            _mark_initialised(layer)
            setattr(table.decoder_layers(self.backbone)[index], table.ffn, layer)
        for index in config.changed_attention():
            self._route_attention(index, parts[index].experts[1:])
        self.post_init()
        if backbone is not None and backbone.generation_config is not None:
            self.generation_config = copy.deepcopy(backbone.generation_config)  # how it ends, samples and pads

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: every tensor comes from the backbone, from stage 1 or from a checkpoint."""

    def _blank_parts(self) -> dict[int, LayerParts]:
        c, text = self.config, self.config.text_config
        experts, settings = len(c.experts), c.gate_settings()

        def blank(d: int, k: int) -> Geometry:
            return Geometry.blank(d, k, settings.fractal_dimensions, experts, settings.anchors, settings.scales)

        table = backbone_of(text.model_type)
        parts = {}
        for index in c.layers:
            gate = blank(SUMMARIES * text.hidden_size, settings.latent) if c.gate_layer(index) == index else None
            output = blank(text.hidden_size, settings.output_latent) if settings.output_latent else None
            parts[index] = LayerParts([table.generalist(self.backbone, index, c.ranks)] * experts, gate, output)
        return parts

    def _build_layer(self, index: int, ffn: nn.Module, parts: LayerParts, placement: Placement | None) -> AlignXLayer:
        settings, rules = self.config.gate_settings(), self.config.serving_rules()
        table = backbone_of(self.config.text_config.model_type)
        mixture: FusedMixture | ParallelMixture | UnchangedFfn
        if not table.projections:
            assert placement is None, "no factors of the FFN that ranks could share"
            mixture = UnchangedFfn(ffn, len(parts.experts))
        elif placement is None:
            mixture = FusedMixture(table.view(ffn), parts.experts, merge=settings.combine == "weights")
        else:
            from alignx_ds.mocae.parallel import ParallelMixture

            mixture = ParallelMixture(table.view(ffn), parts.experts, placement.ep_size, placement.ep_rank)
        calibration = None
        if parts.output is not None:
            calibration = OutputCalibration(parts.output, settings.fractal, settings.natural)
        return AlignXLayer(
            ffn=ffn,
            mixture=mixture,
            calibration=calibration,
            gate=CalibratedGate(parts.gate, settings, rules) if parts.gate is not None else None,
            index=index,
            settings=settings,
            gate_layer=self.config.gate_layer(index),
            forward_pass=self.forward_pass,
            rules=rules,
        )

    def _route_attention(self, index: int, specialists: list[Factors]) -> None:
        """Put modules with the specialists' changes in the place of the attention's projections of a decoder layer."""
        table = backbone_of(self.config.text_config.model_type)
        for p, rank in self.config.attention_ranks.items():
            base = table.linear(self.backbone, index, p)
            changes = [padded(factors, p, rank, base) for factors in specialists]
            made = RoutedLinear(base, changes, self.config.gate_layer(index), self.forward_pass)
            _mark_initialised(made)
            table.owner_of(self.backbone, index, p).set_submodule(getattr(table, p), made)

    def get_input_embeddings(self) -> Any:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.backbone.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        prompt_mask: Tensor | None = None,
        forced: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids, attention_mask, prompt_mask [B, T] int64 -> logits [B, T, V] in the model's dtype.

        `forced` gates [B, E] fp32 are used instead of the gates' own decisions. A KV cache from an earlier call brings
        its routing with it, under whatever name the backbone takes it. Raises ValueError where tokens came before
        `input_ids` but their routing is lost.
        """
        assert input_ids is not None
        # generate() drops a mask of ones: it stays absent, since while decoding it would have to cover the past too.
        flat = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
        token_mask = flat[:, -input_ids.shape[1] :] if flat is not None else None
        cache = kv_cache(kwargs)
        routing: Routing | None = getattr(cache, "routing", None)
        mask = prompt_mask if prompt_mask is not None else token_mask
        if routing is None:
            seen = flat.shape[1] if flat is not None else 0
            if seen > input_ids.shape[1] or (cache is not None and int(cache.get_seq_length()) > 0):
                raise ValueError(LOST_ROUTING)
            assert mask is not None or attention_mask is None, "a 4-D attention mask needs a prompt_mask beside it"
            mask = mask if mask is not None else torch.ones_like(input_ids)
            mask = query_mask(input_ids, mask, self.config.user_turn)
            routing = Routing(mask, self.lexicon(input_ids, mask), forced)
        elif input_ids.shape[1] > 1 and self.config.user_turn:
            routing = self._routed_again(input_ids, mask if mask is not None else torch.ones_like(input_ids), routing)
        self.forward_pass.routing, self.forward_pass.token_mask = routing, token_mask
        self.forward_pass.tokens = unpadded(token_mask) if self.training and self.placement is None else None
        output: CausalLMOutputWithPast = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        cache = kv_cache(output)
        if cache is not None:
            cache.routing = routing
        return output

    def _routed_again(self, input_ids: Tensor, mask: Tensor, routing: Routing) -> Routing:
        """The kept routing, or a new one where these tokens, several in each row, bring a user turn.

        The host waits for the device, which a decoding step of one token never does.
        """
        start = turn_start(input_ids, mask, self.config.user_turn)
        asked = start >= 0
        if not bool(asked.any()):
            return routing
        mask = from_column(mask, start)
        return routing.asked_again(mask, self.lexicon(input_ids, mask), asked)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of any causal LM. With experts spread over ranks it is collective.

        Every token needs the experts of all ranks, so a rank that has finished takes part until the last one has.
        """
        if self.placement is not None and self.placement.ep_size > 1:
            kwargs["synced_gpus"] = True  # transformers sets it under ZeRO-3 only
        return super().generate(*args, **kwargs)

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        """Add a mask of the prompt's tokens to the inputs: every way of decoding calls this with the prompt alone.

        The first forward pass would be too late, because assisted decoding appends its assistant's tokens before it.
        """
        ids, made = super()._expand_inputs_for_generation(*args, **kwargs)
        if made.get("prompt_mask") is None:
            seen = made.get("attention_mask")
            made["prompt_mask"] = seen[:, -ids.shape[1] :] if seen is not None else torch.ones_like(ids)
        return ids, made

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Pass the prompt's mask on, cut to the tokens of the pass; the tokens after the prompt are not part of it.

        So candidates of assisted decoding are never taken for a user turn. Without a cache, the masks of a rank that
        has finished and goes on with the others grow longer than its text: they are cut.
        """
        if not kwargs.get("use_cache", True):
            for name in ("attention_mask", "position_ids"):
                if kwargs.get(name) is not None:
                    kwargs[name] = kwargs[name][..., : input_ids.shape[1]]
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        mask, width = inputs.pop("prompt_mask", None), inputs["input_ids"].shape[1]
        if mask is not None and (width > 1 or not hasattr(kv_cache(inputs), "routing")):
            inputs["prompt_mask"] = pad(mask, (0, input_ids.shape[1] - mask.shape[1]))[:, -width:]
        return inputs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Accept a KV cache from an earlier call, which `forward` takes without naming it."""
        super()._validate_model_kwargs({n: v for n, v in model_kwargs.items() if not isinstance(v, Cache)})

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Raises ValueError if the next step would get a KV cache without the routing that this step left in it."""
        made: dict[str, Any] = super()._update_model_kwargs_for_generation(*args, **kwargs)
        if made.get("use_cache", True) and not hasattr(kv_cache(made), "routing"):
            raise ValueError(LOST_ROUTING)
        return made

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Keep `prompt_mask` from an assistant, whose signature may lack it; an aligned one finds its prompt itself."""
        known = {name: value for name, value in model_kwargs.items() if name != "prompt_mask"}
        return super()._get_candidate_generator(*args, model_kwargs=known, **kwargs)

    def _prefill(self, input_ids: Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "prefill_chunk_size: an aligned model routes by the whole prompt, and would decide from the first "
                "chunk alone; leave prefill_chunk_size out"
            )
        return super()._prefill(input_ids, generation_config, *args, **kwargs)

    @property
    def routing(self) -> Routing:
        """The routing of the last forward pass."""
        assert self.forward_pass.routing is not None, "no forward pass has been made yet"
        return self.forward_pass.routing

    def forget_forward_pass(self) -> None:
        """Drop what the last forward pass has left: its graph keeps the model alive in a cycle unseen by Python."""
        self.forward_pass.routing = None
        for calibration in output_calibrations(self):
            calibration.last_drift = None

    def fused_state(self) -> dict[str, Tensor]:
        """The state dict that the same model has on the fused path. Collective where experts are spread over ranks."""
        state = {k: v for k, v in self.state_dict().items() if ".mixture." not in k}
        table = backbone_of(self.config.text_config.model_type)
        for index, layer in zip(self.config.layers, alignx_layers(self), strict=True):
            stacks = stack(layer.mixture.factors()[1:]) if table.projections else {}
            for name, tensor in stacks.items():
                state[f"backbone.{table.layers}.{index}.{table.ffn}.mixture.{name}"] = tensor
        return state


def _mark_initialised(layer: nn.Module) -> None:
    """Keep `post_init` from filling the router with noise, as it does with new modules inside the backbone."""
    for module in layer.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]


AutoConfig.register(AlignXConfig.model_type, AlignXConfig, exist_ok=True)
AutoModelForCausalLM.register(AlignXConfig, AlignXForCausalLM, exist_ok=True)
