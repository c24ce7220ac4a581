"""The table of architectures: its entries fit, a wrong one is refused clearly, and so is an unknown architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    ALIGNX_LAYERS,
    DENSE,
    FAMILIES,
    LAYERS,
    PECULIARITIES,
    aligned,
    base_model,
    low_rank_experts,
    random_rows,
    relative,
    table_of,
    tiny_config,
)
from transformers import GPT2Config, PreTrainedModel

from alignx_ds.config.schema import ModelConfig
from alignx_ds.errors import ConfigError
from alignx_ds.mocae import backbones
from alignx_ds.mocae.backbones import BACKBONES, FUSED, Backbone, backbone_of
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.models.base import BaseModel

WRONG_NAMES = {
    "layers": ("model.blocks", "LlamaForCausalLM.model.blocks"),
    "ffn": ("feed_forward", "LlamaDecoderLayer.feed_forward"),
    "gate": ("w1", "LlamaMLP.w1"),
    "up": ("w3", "LlamaMLP.w3"),
    "down": ("w2", "LlamaMLP.w2"),
    "activation": ("act", "LlamaMLP.act"),
}


@pytest.mark.parametrize("family", DENSE)
def test_an_entry_names_the_weights_that_its_view_shows(family: str) -> None:
    base = base_model(family=family)
    table, weights = table_of(base), base.state_dict(keep_vars=True)
    for layer in ALIGNX_LAYERS:
        ffn = table.view(table.ffn_of(base, layer))
        for p in PROJECTIONS:
            assert weights[table.weight_name(layer, p)] is ffn.projection(p).weight


@pytest.mark.parametrize("family", DENSE)
@torch.no_grad()
def test_the_view_computes_the_backbone_s_own_ffn(family: str) -> None:
    base = base_model(family=family)
    ffn = table_of(base).ffn_of(base, 1)
    view, x = table_of(base).view(ffn), torch.randn(7, base.config.hidden_size)
    assert torch.equal(view.down(view.activation(view.gate(x)) * view.up(x)), ffn(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_map_never_splits_a_decoder_layer(family: str) -> None:
    """transformers collects `_no_split_modules` from the backbone."""
    base = base_model(family=family)
    model = aligned(base, low_rank_experts(base))
    assert type(table_of(base).decoder_layers(base)[0]).__name__ in model._no_split_modules


@torch.no_grad()
def disabled(base: PreTrainedModel, family: str, what: str) -> PreTrainedModel:
    """The same weights without one peculiarity of the family."""
    without: dict[str, dict[str, Any]] = {
        "window": {"use_sliding_window": False} if family == "qwen2" else {"sliding_window": None},
        "full attention": {"layer_types": ["sliding_attention"] * LAYERS},
        "sliding attention": {"layer_types": ["full_attention"] * LAYERS},
        "final cap": {"final_logit_softcapping": None},
        "cap": {"attn_logit_softcapping": None},
        "layer without positions": {"no_rope_layers": [1] * LAYERS},
        "clip": {"clip_qkv": None},
        "second of the experts": {"num_experts_per_tok": 1},
    }
    model = base_model(family=family, **without.get(what, {}))
    model.load_state_dict(base.state_dict())
    for name, parameter in model.named_parameters():
        if what in name:
            parameter.fill_(0.0 if what == "bias" else 1.0)
    return model.eval()


WHAT_IS_PECULIAR = {
    "mistral": ["window"],
    "gemma2": ["full attention", "sliding attention", "final cap", "cap", "post_feedforward_layernorm"],
    "gemma3_text": ["full attention", "sliding attention", "q_norm", "post_feedforward_layernorm"],
    "olmo2": ["k_norm", "post_feedforward_layernorm"],
    "olmo3": ["full attention", "sliding attention"],
    "qwen2": ["window", "bias"],
    "mixtral": ["window", "second of the experts"],
    "olmoe": ["clip", "k_norm", "second of the experts"],
    "qwen3": ["q_norm"],
    "qwen3_moe": ["q_norm", "second of the experts"],
    "smollm3": ["layer without positions"],
}


@pytest.mark.parametrize(("family", "what"), [(f, what) for f, of in WHAT_IS_PECULIAR.items() for what in of])
@torch.no_grad()
def test_a_tiny_model_depends_on_what_is_peculiar_to_its_family(family: str, what: str) -> None:
    """Otherwise the other tests would not cover it."""
    base, ids = base_model(family=family), torch.tensor(random_rows([12]))
    assert relative(disabled(base, family, what)(ids).logits, base(ids).logits) > 0.01


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "qwen3", "qwen3_moe"])
def test_a_tiny_model_s_heads_can_be_of_their_own_width(family: str) -> None:
    config = tiny_config(family)
    assert config.head_dim * config.num_attention_heads != config.hidden_size


def test_every_family_has_its_tiny_model() -> None:
    assert set(PECULIARITIES) == {*BACKBONES, *FUSED}


@pytest.mark.parametrize("field", WRONG_NAMES)
def test_a_wrong_name_in_an_entry_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    name, given = WRONG_NAMES[field]
    base = base_model()
    experts = low_rank_experts(base)
    monkeypatch.setitem(backbones.BACKBONES, "llama", replace(Backbone(), **{field: name}))
    with pytest.raises(ConfigError) as error:
        aligned(base, experts)
    text = str(error.value)
    assert text.startswith(f"alignx_ds/mocae/backbones.py: got {given!r}, expected the name of a ")
    assert "BACKBONES" in text and "\n" not in text
    if field not in ("layers", "ffn"):
        assert "LlamaMLP, which has gate_proj, up_proj, down_proj, act_fn" in text


@pytest.mark.parametrize(("field", "name"), [("layers", "model.norm"), ("gate", "act_fn")])
def test_the_name_of_another_kind_of_module_is_refused(field: str, name: str) -> None:
    base, table = base_model(), replace(Backbone(), **{field: name})
    with pytest.raises(ConfigError, match=r"expected the name of a (ModuleList|Linear) in \w+, not of a \w+;"):
        table.view(table.ffn_of(base, 1))


def test_an_unknown_architecture_is_refused_with_all_known_ones(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as error:
        assert BaseModel(ModelConfig(path=str(tmp_path))).table
    text = str(error.value)
    assert "\n" not in text
    known = ", ".join(sorted((*BACKBONES, *FUSED)))
    assert "phi3" in known
    assert f"got 'gpt2', expected a model whose architecture is one of {known};" in text
    assert "add an entry for 'gpt2' to BACKBONES in alignx_ds/mocae/backbones.py: the names of " in text


@pytest.mark.parametrize("model_type", ["", "gemma3n", "Llama"])
def test_a_similar_architecture_is_not_taken_for_a_known_one(model_type: str) -> None:
    """Gemma 3n's decoder layer has the same names, but hands on several copies of the hidden states."""
    with pytest.raises(ConfigError):
        backbone_of(model_type)
