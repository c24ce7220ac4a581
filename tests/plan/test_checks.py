"""What can be known to be wrong before anything starts: each rule, its fix, and all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import base_model

from alignx_ds.config import parse
from alignx_ds.config.schema import RunConfig
from alignx_ds.errors import ConfigError
from alignx_ds.plan.checks import check

WriteRecipe = Callable[..., Path]
# The config is only changed in the keys that every example sets.
same_config = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def problems(settings: RunConfig, world_size: int = 1) -> dict[str, str]:
    try:
        check(settings, world_size)
    except ConfigError as error:
        return {p.key: str(p) for p in error.problems}
    return {}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_shipped_recipe_passes(repo_root: Path, ranks: int) -> None:
    for recipe in sorted((repo_root / "launch/recipes").glob("world*.yaml")):
        settings = parse.load(recipe, ["align.ep_size=1"])
        assert problems(settings, ranks) == {}


def test_the_base_model_is_handed_on(tiny_config: RunConfig) -> None:
    base = check(tiny_config, 1)
    assert base.config.num_hidden_layers == 5
    assert base.layers == [2, 3, 4]


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=-1",
        "gate.scales=1",
        "gate.fractal=inf",
        "train.lr=nan",
        "data.calibration_share=1",
        "model.dtype=float16",
        "axes.honest.judge=gpt",
        "axes.honest.train=nowhere.csv",
        "generalist.held_out=nowhere.jsonl",
        "model.layers=[5]",
        "model.layers=[-1]",
        "model.layers=[2,2]",
        "axes.harmless.noise_layers=[5]",
        "model.path=./no/such/model",
        "gate.latent=129",
        "gate.output_latent=129",
        "gate.output_latent=-1",
        "gate.top_k=5",
        "gate.more.nearest=0.5",
        "align.ep_size=-1",
        "train.deepspeed=nowhere.json",
        "baselines.make=[ties,slerp]",
        "baselines.make=[dare,dare]",
        "baselines.trinityx.uniform=inf",
        "baselines.h3fusion.drift_scale.kind=2",
        "train.evaluate.patience=2",
        "baselines.h3fusion.deepspeed=nowhere.json",
    ],
)
def test_a_value_that_cannot_be_is_named_and_nothing_else(write_recipe: WriteRecipe, override: str) -> None:
    """A bound of each kind, and every rule that looks at a file, at the model or at another key."""
    key, value = override.split("=")
    found = problems(parse.load(write_recipe(override)))
    assert list(found) == [key]
    assert value.strip("[]").split(",")[0] in found[key]


@pytest.mark.parametrize(
    "override",
    [
        "experts.rank=0",
        "axes.honest.judge=''",
        "generalist={}",
        "gate.fractal=0",
        "model.layers=[]",
        "model.layers=[4,0]",
        "axes.harmless.noise_layers=[4,0]",
        "gate.latent=128",
        "gate.top_k=4",
        "train.deepspeed=ds_configs/stage2_moe_zero2.json",
        "model.dtype=bfloat16",
        "baselines.make=[]",
        "baselines.ties_density=1",
        "gate.output_latent=0",
        "align.ep_size=0",
        "baselines.h3fusion.deepspeed=ds_configs/scratch_zero1.json",
    ],
)
def test_a_value_on_the_bound_passes(write_recipe: WriteRecipe, override: str) -> None:
    assert problems(parse.load(write_recipe(override))) == {}


LORA = pytest.mark.parametrize(
    ("override", "key"),
    [
        ("experts.rank=0", "experts.rank"),
        ("train.lora.targets=[]", "train.lora.targets"),
        ("train.lora.targets=[up_proj,up_proj]", "train.lora.targets"),
        ("train.lora.targets=[q_proj]", "baselines.make"),
        ("train.keep.collision=1", "train.keep"),
        ("baselines.make=[sequential_regularised]", "baselines.make"),
    ],
)


def test_what_works_on_ffns_alone_is_refused_where_all_weights_are_trained(write_recipe: WriteRecipe) -> None:
    for override, key in (
        ("train.keep.fisher=1", "train.keep"),
        ("baselines.make=[sequential_regularised]", "baselines.make"),
        ("baselines.make=[restored]", "baselines.make"),
    ):
        found = problems(parse.load(write_recipe("train.trainable=all", override)))
        assert list(found) == [key] and "set train.trainable=ffn" in found[key]
    assert problems(parse.load(write_recipe("train.trainable=all"))) == {}


@LORA
def test_lora_that_is_no_expert_or_keeps_something_is_refused(
    write_recipe: WriteRecipe, override: str, key: str
) -> None:
    found = problems(parse.load(write_recipe("train.trainable=lora", override)))
    assert list(found) == [key]
    assert problems(parse.load(write_recipe("train.trainable=lora"))) == {}


@pytest.mark.parametrize(
    ("override", "key"), [("gate.scope=per_layer", "train.lora.targets"), ("model.layers=[4]", "model.layers")]
)
def test_the_attention_is_changed_above_a_shared_gate_alone(write_recipe: WriteRecipe, override: str, key: str) -> None:
    chosen = ("train.trainable=lora", "train.lora.targets=[q_proj, up_proj]", "baselines.make=[]")
    assert problems(parse.load(write_recipe(*chosen))) == {}
    assert list(problems(parse.load(write_recipe(*chosen, override)))) == [key]


def test_noise_on_layers_is_refused_with_another_objective(write_recipe: WriteRecipe) -> None:
    found = problems(parse.load(write_recipe("axes.harmless.noise_layers=[0]", "axes.harmless.objective=dpo")))
    assert list(found) == ["axes.harmless.noise_layers"]


def test_the_fractal_subspace_fits_into_both_latent_spaces(tiny_config: RunConfig) -> None:
    tiny_config.gate.fractal_dimensions = tiny_config.gate.output_latent + 1
    assert list(problems(tiny_config)) == ["gate.fractal_dimensions"]


@pytest.mark.parametrize("name", ["base", "generalist", "sequential", "ties", "h3fusion", "two words", "../up", ""])
def test_an_axis_may_not_take_a_name_that_files_or_systems_have(tiny_config: RunConfig, name: str) -> None:
    tiny_config.axes[name] = tiny_config.axes.pop("honest")
    assert list(problems(tiny_config)) == [f"axes.{name}"]


def test_the_offline_pairwise_judge_needs_its_files(write_recipe: WriteRecipe) -> None:
    missing = ("judges.preferences=nowhere.jsonl", "judges.reference=nowhere.json")
    found = problems(parse.load(write_recipe("axes.helpful.judge=offline_pairwise", *missing)))
    assert list(found) == ["judges.preferences", "judges.reference"]
    assert problems(parse.load(write_recipe(*missing))) == {}, "no judge reads them"


def test_a_baseline_that_is_not_made_is_not_looked_at(write_recipe: WriteRecipe) -> None:
    """Apart from the bounds, which hold for every value."""
    broken = ("baselines.h3fusion.batch=7", "baselines.h3fusion.deepspeed=nowhere.json")
    assert problems(parse.load(write_recipe("baselines.make=[ties]", *broken)), 2) == {}
    found = problems(parse.load(write_recipe("baselines.make=[h3fusion]", *broken)), 2)
    assert list(found) == ["baselines.h3fusion.batch", "baselines.h3fusion.deepspeed"]
    unused = write_recipe("baselines.make=[ties]", "baselines.h3fusion.steps=0")
    assert list(problems(parse.load(unused))) == ["baselines.h3fusion.steps"]


def test_a_fusion_does_not_run_under_zero3(write_recipe: WriteRecipe) -> None:
    found = problems(parse.load(write_recipe("baselines.trinityx.deepspeed=ds_configs/stage1_zero3.json")))
    assert list(found) == ["baselines.trinityx.deepspeed"]
    assert "ds_configs/fusion_zero2.json" in found["baselines.trinityx.deepspeed"]


def test_stage_2_runs_under_zero3_on_the_fused_path_alone(write_recipe: WriteRecipe) -> None:
    sharded = write_recipe("align.deepspeed=ds_configs/stage1_zero3.json")
    assert "set align.ep_size=0" in problems(parse.load(sharded))["align.deepspeed"]
    assert problems(parse.load(sharded, ["align.ep_size=0"]), world_size=8) == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero3_trains_experts_in_the_gates_dtype_alone(write_recipe: WriteRecipe, dtype: str) -> None:
    """DeepSpeed joins all trained weights in one buffer, and gates stay in fp32."""
    recipe = write_recipe("align.deepspeed=ds_configs/stage1_zero3.json", "align.ep_size=0", f"model.dtype={dtype}")
    assert problems(parse.load(recipe, ["align.expert_lr_scale=0"])) == {}
    found = problems(parse.load(recipe, ["align.expert_lr_scale=0.1"]))
    assert list(found) == (["align.deepspeed"] if dtype == "bfloat16" else [])
    assert all("set align.expert_lr_scale=0 or model.dtype=float32" in said for said in found.values())


def test_without_an_axis_there_is_nothing_to_align(tiny_config: RunConfig) -> None:
    tiny_config.axes = {}
    assert list(problems(tiny_config)) == ["axes"]


@same_config
@given(ep_size=st.integers(0, 9), world_size=st.integers(1, 9), axes=st.integers(1, 5))
def test_ep_size_divides_the_experts_and_the_ranks(
    tiny_config: RunConfig, ep_size: int, world_size: int, axes: int
) -> None:
    entry = next(iter(tiny_config.axes.values()))
    tiny_config.axes = {f"axis{n}": entry for n in range(axes)}
    tiny_config.align.ep_size = ep_size
    tiny_config.baselines.make = []  # they have batches of their own
    tiny_config.train.batch = tiny_config.align.batch = world_size
    fits = ep_size == 0 or ((axes + 1) % ep_size == 0 and world_size % ep_size == 0)
    assert set(problems(tiny_config, world_size)) == (set() if fits else {"align.ep_size"})


@same_config
@given(batch=st.integers(1, 200), accumulation=st.integers(1, 6), world_size=st.integers(1, 8))
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(
    tiny_config: RunConfig, batch: int, accumulation: int, world_size: int
) -> None:
    fusions = {f"baselines.{name}": getattr(tiny_config.baselines, name) for name in ("h3fusion", "trinityx")}
    stages = {"train": tiny_config.train, "align": tiny_config.align, **fusions}
    for stage in stages.values():
        stage.batch, stage.accumulation = batch, accumulation
    found = problems(tiny_config, world_size)
    fits = batch % (world_size * accumulation) == 0
    assert set(found) == (set() if fits else {f"{key}.batch" for key in stages})
    if found:
        proposed = int(found["train.batch"].split("choose ")[1].split(",")[0])
        for stage in stages.values():
            stage.batch = proposed
        assert problems(tiny_config, world_size) == {}


@pytest.mark.parametrize("stage", [0, 3])
def test_stage_two_refuses_the_zero_stages_that_moe_cannot_use(
    write_recipe: WriteRecipe, tmp_path: Path, stage: int
) -> None:
    (tmp_path / "ds.json").write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
    found = problems(parse.load(write_recipe(f"align.deepspeed={tmp_path / 'ds.json'}")))
    assert list(found) == ["align.deepspeed"]
    assert f"ZeRO stage {stage}" in found["align.deepspeed"]


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{",
        b"\xff",
        b'{"zero_optimization": 3}',
        b'{"zero_optimization": {"stage": "auto"}}',
        b'{"zero_optimization": {"stage": 2}, "communication_data_type": "auto"}',
    ],
)
def test_a_deepspeed_file_that_cannot_be_used_is_named(
    write_recipe: WriteRecipe, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "ds.json").write_bytes(content)
    found = problems(parse.load(write_recipe(f"align.deepspeed={tmp_path / 'ds.json'}")))
    assert len(found) == 1
    assert "ds.json" in next(iter(found.values()))


def test_a_model_without_a_config_is_refused(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert list(problems(parse.load(write_recipe(f"model.path={tmp_path / 'model'}")))) == ["model.path"]


def test_an_unknown_architecture_is_refused(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({}, tmp_path / "model.safetensors")
    found = problems(parse.load(write_recipe(f"model.path={tmp_path}")))
    assert list(found) == ["model.path"]
    assert "gpt2" in found["model.path"]


def test_a_set_to_be_judged_on_is_not_trained_on(write_recipe: WriteRecipe) -> None:
    found = problems(parse.load(write_recipe("axes.honest.schema=honeset", "axes.honest.train=owner/name")))
    assert "a schema with answers to imitate" in found["axes.honest.schema"]


def test_epochs_count_where_there_are_no_steps(write_recipe: WriteRecipe) -> None:
    assert list(problems(parse.load(write_recipe("train.epochs=0", "train.steps=0")))) == ["train.epochs"]
    assert problems(parse.load(write_recipe("train.epochs=0", "train.steps=1"))) == {}
    assert list(problems(parse.load(write_recipe("train.epochs=nan", "train.steps=1")))) == ["train.epochs"]


def test_a_mapping_of_unknown_columns_is_named_with_the_known_ones(write_recipe: WriteRecipe) -> None:
    found = problems(parse.load(write_recipe("axes.helpful.columns.answer=text", "axes.helpful.columns.output=text")))
    assert set(found) == {"axes.helpful.columns"}
    assert "no column answer; it has instruction, input, output" in found["axes.helpful.columns"]


def test_only_the_world_makes_its_held_out_rows_itself(write_recipe: WriteRecipe) -> None:
    assert list(problems(parse.load(write_recipe("axes.honest.held_out=''")))) == ["axes.honest.held_out"]
    split_off = ("axes.honest.train=owner/name:train", "axes.honest.held_out=''")
    assert problems(parse.load(write_recipe(*split_off))) == {}


def test_held_out_rows_without_training_rows_are_no_generalist(write_recipe: WriteRecipe) -> None:
    assert list(problems(parse.load(write_recipe("generalist.train=''")))) == ["generalist.held_out"]


def test_all_problems_are_found_at_once(write_recipe: WriteRecipe) -> None:
    wrong = {
        "align.ep_size": "3",
        "align.deepspeed": "ds_configs/stage1_zero3.json",
        "axes.helpful.train": "nowhere.json",
        "axes.honest.judge": "gpt",
        "model.path": "./no/such/model",
        "train.batch": "33",
        "gate.top_k": "9",
        "seed": "-1",
    }
    found = problems(parse.load(write_recipe(*(f"{k}={v}" for k, v in wrong.items()))), world_size=2)
    assert set(found) == set(wrong)


def test_sdpa_can_t_cap_the_scores_of_attention(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    base_model(family="gemma2").save_pretrained(tmp_path / "model")
    chosen = (f"model.path={tmp_path / 'model'}", "model.layers=[1]", "gate.latent=8", "gate.output_latent=8")
    for attention in ("sdpa", "auto", "eager"):
        found = problems(parse.load(write_recipe(*chosen, f"model.attention={attention}")))
        assert ("model.attention" in found) == (attention == "sdpa")


def test_flash_attention_needs_its_package_and_bfloat16(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = parse.load(write_recipe("model.attention=flash_attention_2"))
    for there, key, told in ((False, "model.attention", "pip install flash-attn"), (True, "model.dtype", "bfloat16")):
        monkeypatch.setattr("alignx_ds.plan.model.is_flash_attn_2_available", lambda there=there: there)
        found = problems(settings)
        assert list(found) == [key] and told in found[key]
    settings.model.dtype = "bfloat16"
    assert problems(settings) == {}
