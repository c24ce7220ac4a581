"""A whole run on a tiny Phi-3, from stage 1 under ZeRO-3 to exports that load beside the original checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from processes import in_this_process
from safetensors.torch import load_file
from tiny_models import base_model, relative
from transformers import AutoModelForCausalLM, MistralForCausalLM, Phi3ForCausalLM, PreTrainedTokenizerBase

from alignx_ds import cli
from alignx_ds.experts.task_vectors import read_factors
from alignx_ds.export.fidelity import without_calibration
from alignx_ds.mocae.modeling import AlignXForCausalLM

pytestmark = pytest.mark.usefixtures("no_launcher")
LORA = ("train.trainable=lora", "train.lora.targets=[up_proj,q_proj,v_proj]", "train.lr=0.05")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, world_tokenizer: PreTrainedTokenizerBase) -> Path:
    directory = tmp_path_factory.mktemp("phi3") / "base"
    sizes = {"vocab_size": len(world_tokenizer), "max_position_embeddings": 256, "sliding_window": None}
    base_model(family="phi3", **sizes).save_pretrained(directory)
    world_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def run(base: Path, small_run: tuple[str, ...]) -> Path:
    output = base.with_name("run")
    settings = (*small_run, f"model.path={base}", "model.layers=[0,1,2]", *LORA, f"output={output}")
    done = in_this_process("run", "launch/recipes/world.yaml", *settings)
    assert done.returncode == 0, done.stderr
    return output


def test_its_parts_are_changed_by_themselves(run: Path) -> None:
    found = read_factors(run / "specialists" / "helpful", 1)
    assert sorted(found.down) == ["down", "gate", "q", "up", "v"]
    assert found.delta("up").any() and found.delta("v").any() and not found.delta("gate").any()


@torch.no_grad()
def test_an_expert_is_an_adapter_of_the_original_checkpoint(run: Path, base: Path, tmp_path: Path) -> None:
    assert cli.main(["export", "adapters", str(run), str(tmp_path / "adapters"), "--rows", "2"]) == 0
    place = tmp_path / "adapters" / "honest"
    modules = {name.split(".")[-3] for name in load_file(place / "adapter_model.safetensors")}
    assert modules == {"gate_up_proj", "down_proj", "qkv_proj"} == {*settings(place)["target_modules"]}
    original = AutoModelForCausalLM.from_pretrained(base)
    assert type(original) is Phi3ForCausalLM
    plain = original(IDS).logits
    adapted = PeftModel.from_pretrained(original, place).eval()(IDS).logits
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert isinstance(model, AlignXForCausalLM) and model.config.fused == "phi3"
    forced = torch.eye(len(model.config.experts))[model.config.experts.index("honest")][None]
    with without_calibration(model):
        assert relative(adapted, model(IDS, forced=forced).logits) < 1e-5
    assert relative(adapted, plain) > 0.01


def settings(place: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads((place / "adapter_config.json").read_text())
    return found


@torch.no_grad()
def test_whole_exports_are_mistral_and_need_no_base(run: Path, tmp_path: Path) -> None:
    assert cli.main(["export", "dense", str(run), str(tmp_path / "dense"), "--axes", "helpful", "--rows", "2"]) == 0
    assert cli.main(["export", "hf", str(run), str(tmp_path / "hf")]) == 0
    dense, shared = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "hf"))
    assert type(dense) is MistralForCausalLM and type(shared.backbone) is MistralForCausalLM
    written = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert written["architectures"] == ["MistralForCausalLM"] and "fused" not in written
    assert relative(shared(IDS).logits, AutoModelForCausalLM.from_pretrained(run / "model")(IDS).logits) < 1e-6
