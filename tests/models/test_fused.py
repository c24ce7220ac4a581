"""Phi-3, whose files hold several projections in one weight, is read as the Mistral model that computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import base_model, padded, random_rows, relative
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds import cli
from alignx_ds.config.schema import ModelConfig
from alignx_ds.errors import ConfigError
from alignx_ds.models.backbone import load_backbone
from alignx_ds.models.base import BaseModel

WriteRecipe = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes | None]]
OWN_CODE = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
pytestmark = pytest.mark.usefixtures("no_launcher")


def written(directory: Path, **settings: Any) -> PreTrainedModel:
    model = base_model(family="phi3", **settings)
    model.save_pretrained(directory)
    return model


def edit(directory: Path, **values: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def read(directory: Path, **settings: Any) -> BaseModel:
    return BaseModel(ModelConfig(path=str(directory), **settings))


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no window": {"sliding_window": None},
    "one key per query": {"num_key_value_heads": 4},
    "tied": {"tied": True},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_transformers_own_class_does(tmp_path: Path, snapshot: Snapshot, kind: str) -> None:
    phi = written(tmp_path, **KINDS[kind])
    GenerationConfig(eos_token_id=[3, 4], temperature=0.5, do_sample=True).save_pretrained(tmp_path)
    before, base = snapshot(tmp_path), read(tmp_path)
    assert base.checkpoint_problem() is None
    base.check_finite()
    model = load_backbone(base)
    assert type(model) is MistralForCausalLM and model.generation_config.eos_token_id == [3, 4]
    ids, mask = padded(random_rows([12, 7]))
    real = mask.bool()
    assert relative(model(ids, attention_mask=mask).logits[real], phi(ids, attention_mask=mask).logits[real]) < 1e-5
    assert snapshot(tmp_path) == before


def test_every_weight_is_read_by_itself_from_any_file(tmp_path: Path) -> None:
    phi = written(tmp_path)
    phi.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").unlink()
    base, weights = read(tmp_path, dtype="bfloat16"), phi.state_dict()
    gate, up = weights["model.layers.2.mlp.gate_up_proj.weight"].chunk(2)
    query, key, value = weights["model.layers.2.self_attn.qkv_proj.weight"].split([32, 16, 16])
    for name, wanted in {"gate": gate, "up": up, "q": query, "k": key, "v": value}.items():
        assert torch.equal(base.start(base.table.weight_name(2, name)), wanted.bfloat16().float())
    stored = base.tensors["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(stored.read_rows(5, 9), up[5:9]) and stored.shape == up.shape


def test_the_bare_decoder_s_names_are_known_too(tmp_path: Path) -> None:
    phi = written(tmp_path, tied=True)
    phi.model.save_pretrained(tmp_path)
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "model.safetensors"))
    assert read(tmp_path).checkpoint_problem() is None


SPOILED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "too few rows": (lambda w: w[:-2].clone(), "as its config.json says"),
    "flat": (lambda w: w.flatten(), "as its config.json says"),
    "a number": (lambda w: w[0, 0].clone(), "it lacks model.layers.0.mlp.gate_proj.weight"),
    "not gathered": (lambda w: torch.empty(0), "zero_to_fp32.py"),
    "integers": (lambda w: w.to(torch.int8), "as in a quantised model"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_weight_is_refused(tmp_path: Path, kind: str) -> None:
    written(tmp_path)
    spoil, expected = SPOILED[kind]
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.mlp.gate_up_proj.weight"] = spoil(weights["model.layers.0.mlp.gate_up_proj.weight"])
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert expected in str(read(tmp_path).checkpoint_problem())


def test_a_value_that_is_no_number_is_found(tmp_path: Path) -> None:
    written(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.mlp.gate_up_proj.weight"][-1, -1] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"its model\.layers\.0\.mlp\.up_proj\.weight holds NaN"):
        read(tmp_path).check_finite()


FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
POSITIONS: dict[str, tuple[dict[str, Any], str]] = {  # as they were published, and as transformers writes them now
    "Phi-3-mini-128k": ({"rope_scaling": {"type": "longrope", **FACTORS}, "rope_theta": 1e4}, "rope_type longrope"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}}, "rope_type longrope"),
    "a part of a head": ({"rope_theta": 1e4, "partial_rotary_factor": 0.75}, "partial_rotary_factor 0.75"),
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_other_positions_are_refused_in_one_line(
    tmp_path: Path, write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    written(tmp_path / "phi")
    rope, said = POSITIONS[kind]
    edit(tmp_path / "phi", **{"rope_parameters": None, **rope})
    assert cli.main(["run", str(write_recipe(f"model.path={tmp_path / 'phi'}")), "--dry-run"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "model.path" in line]
    assert len(lines) == 1 and said in lines[0] and "choose another model" in lines[0], lines


@pytest.mark.parametrize("prefix", ["", "microsoft/Phi-3-mini-4k-instruct--"])
def test_the_code_that_transformers_took_over_is_no_reason_to_refuse_it_and_does_not_run(
    tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase, prefix: str
) -> None:
    written(tmp_path)
    world_tokenizer.save_pretrained(tmp_path)
    for module in ("configuration_phi3.py", "modeling_phi3.py"):
        (tmp_path / module).write_text("raise AssertionError('it ran')\n")
    edit(tmp_path, auto_map={name: f"{prefix}{path}" for name, path in OWN_CODE.items()})
    base = read(tmp_path)
    assert base.checkpoint_problem() is None and base.tokenizer and load_backbone(base)
    assert not hasattr(base.config, "auto_map")


@pytest.mark.parametrize(
    "auto_map",
    [
        OWN_CODE | {"AutoModelForCausalLM": "modeling_own.Phi3ForCausalLM"},
        OWN_CODE | {"AutoTokenizer": "x.Y"},
        None,
        [1],
    ],
)
def test_other_code_is_refused(tmp_path: Path, auto_map: Any) -> None:
    written(tmp_path)
    edit(tmp_path, auto_map=auto_map)
    with pytest.raises(ConfigError, match="auto_map"):
        read(tmp_path)


def test_a_model_of_the_same_function_is_not_called_fused(tmp_path: Path) -> None:
    base_model(family="mistral").save_pretrained(tmp_path)
    assert read(tmp_path).fused == "" and AutoConfig.from_pretrained(tmp_path).model_type == "mistral"
