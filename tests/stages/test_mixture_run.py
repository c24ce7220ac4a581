"""A whole run on a tiny Mixtral: stage 1 trains LoRA of its attention, stage 2 routes it, and its FFNs stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import in_this_process
from tiny_models import base_model
from transformers import AutoModelForCausalLM, MixtralForCausalLM, PreTrainedTokenizerBase

from alignx_ds import cli
from alignx_ds.experts.task_vectors import read_factors
from alignx_ds.mocae.modeling import AlignXForCausalLM

pytestmark = pytest.mark.usefixtures("no_launcher")
AXES = ("helpful", "harmless", "honest")
SETTINGS = (
    *("model.layers=[0,1,2]", "train.trainable=lora", "train.lora.targets=[q_proj,v_proj]", "align.ep_size=0"),
    *("baselines.make=[task_arithmetic]", "train.lr=0.05"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, world_tokenizer: PreTrainedTokenizerBase) -> Path:
    directory = tmp_path_factory.mktemp("mixtral") / "base"
    sizes = {"vocab_size": len(world_tokenizer), "max_position_embeddings": 256, "sliding_window": None}
    base_model(family="mixtral", **sizes).save_pretrained(directory)
    world_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def run(base: Path, small_run: tuple[str, ...]) -> Path:
    output = base.with_name("run")
    done = in_this_process(
        "run", "launch/recipes/world.yaml", *small_run, f"model.path={base}", *SETTINGS, f"output={output}"
    )
    assert done.returncode == 0, done.stderr
    return output


def test_the_specialists_change_the_attention_above_the_lowest_layer_alone(run: Path) -> None:
    for axis in AXES:
        changed = [sorted(read_factors(run / "specialists" / axis, layer).down) for layer in (0, 1, 2)]
        assert changed == [[], ["q", "v"], ["q", "v"]]


def test_stage_2_keeps_the_base_model_to_the_bit(run: Path, base: Path) -> None:
    model, plain = (AutoModelForCausalLM.from_pretrained(place) for place in (run / "model", base))
    assert isinstance(model, AlignXForCausalLM) and model.config.ranks == {}
    ours = model.backbone.state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(ours[name.replace(".mlp.", ".mlp.ffn.")], weight), name


def test_without_output_calibration_a_rightly_routed_prompt_has_its_specialist_s_answer(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert set(report["systems"]) == {"base", *AXES, "sequential", "mixed", "task_arithmetic", "alignx"}
    found, ppl = report["ablations"]["no_output_calibration"]["perplexity"], report["perplexity"]
    right = [axis for axis in AXES if report["router"]["sources"][axis]["accuracy"] == 1]
    assert right, "words tell the world's axes apart, also where nothing was pretrained"
    for axis in right:
        assert found[axis] == pytest.approx(ppl[axis][axis], rel=1e-4)
        assert abs(ppl[axis][axis] / ppl["base"][axis] - 1) > 0.01, "stage 1 has changed something"


def test_an_expert_is_exported_as_a_plain_mixtral(run: Path, base: Path, tmp_path: Path) -> None:
    assert cli.main(["export", "dense", str(run), str(tmp_path / "dense"), "--axes", "helpful", "--rows", "2"]) == 0
    dense, plain = (AutoModelForCausalLM.from_pretrained(place) for place in (tmp_path / "dense", base))
    assert type(dense) is MixtralForCausalLM
    before = plain.state_dict()
    changed = {name for name, weight in dense.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (1, 2) for p in "qv"}
