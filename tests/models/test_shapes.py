"""The shipped shapes are those of the published models, and build models that AlignX knows."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
)

from alignx_ds.mocae.backbones import backbone_of
from alignx_ds.models.shapes import ASSETS, SHAPES, shape

PUBLISHED: dict[str, tuple[type[PreTrainedModel], int]] = {
    "llama2-7b": (LlamaForCausalLM, 6_738_415_616),
    "mistral-7b": (MistralForCausalLM, 7_241_732_096),
    "gemma-7b": (GemmaForCausalLM, 8_537_680_896),
    "deepseek-llm-7b": (LlamaForCausalLM, 6_910_365_696),
    "llama2-70b": (LlamaForCausalLM, 68_976_648_192),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_builds_the_published_model(name: str) -> None:
    config = shape(name)
    assert config is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kind, parameters = PUBLISHED[name]
    assert type(model) is kind
    assert model.num_parameters() == parameters
    table = backbone_of(config.model_type)
    ffn = table.view(table.ffn_of(model, config.num_hidden_layers - 1))
    assert (ffn.gate.in_features, ffn.gate.out_features) == (config.hidden_size, config.intermediate_size)


def test_the_shapes_differ_where_the_published_models_do() -> None:
    """What parameter counts do not show."""
    llama, mistral, gemma, deepseek, large = (shape(name) for name in SHAPES)
    assert (large.num_hidden_layers, large.num_attention_heads, large.num_key_value_heads) == (80, 64, 8)
    assert (large.max_position_embeddings, large.rms_norm_eps, large.eos_token_id) == (4096, 1e-5, 2)
    assert mistral.sliding_window == 4096 and not hasattr(llama, "sliding_window")
    assert gemma.head_dim == 256 and gemma.hidden_act == "gelu_pytorch_tanh" and gemma.tie_word_embeddings
    assert [c.num_key_value_heads for c in (llama, mistral, gemma, deepseek)] == [32, 8, 16, 32]
    assert [c.max_position_embeddings for c in (llama, mistral, gemma, deepseek)] == [4096, 32768, 8192, 4096]
    assert [c.rms_norm_eps for c in (llama, mistral, gemma, deepseek)] == [1e-5, 1e-5, 1e-6, 1e-6]
    assert [c.eos_token_id for c in (llama, mistral, gemma, deepseek)] == [2, 2, 1, 100001]
    assert {c.rope_parameters["rope_theta"] for c in (llama, mistral, gemma, deepseek)} == {10000.0}


HUB_IDS = {
    "llama2-7b": ["meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"],
    "mistral-7b": ["mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1"],
    "gemma-7b": ["google/gemma-7b", "google/gemma-7b-it", "google/gemma-1.1-7b-it"],
    "deepseek-llm-7b": ["deepseek-ai/deepseek-llm-7b-base", "deepseek-ai/deepseek-llm-7b-chat"],
    "llama2-70b": ["meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-70b-chat-hf"],
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_found_by_name_hub_id_and_sibling(name: str) -> None:
    expected = shape(name).to_dict()
    assert HUB_IDS[name][0] == SHAPES[name]
    for hub_id in HUB_IDS[name]:
        assert shape(hub_id).to_dict() == expected


@pytest.mark.parametrize(
    "other", ["", "world", "llama", "mistralai/Mistral-7B-Instruct-v0.2", "meta-llama/Llama-2-13b-hf"]
)
def test_any_other_model_has_no_shape(other: str) -> None:
    assert shape(other) is None


def test_every_shipped_file_is_a_shape() -> None:
    assert {path.stem for path in ASSETS.iterdir()} == set(SHAPES) == set(PUBLISHED)
