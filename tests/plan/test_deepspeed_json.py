"""A stage's DeepSpeed JSON: those of other tools work, and whatever can't be followed is named in one line."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed_jsons import AUTO_ADAMW, JSONS, ZERO3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignx_ds.config import parse
from alignx_ds.config.schema import AlignConfig, FusionConfig, OptimizerConfig, RunConfig, SpecialistConfig
from alignx_ds.errors import Problem
from alignx_ds.plan import deepspeed_keys as keys
from alignx_ds.plan import training
from alignx_ds.plan.checks import check
from alignx_ds.plan.deepspeed_json import StageJson, without_effect
from alignx_ds.plan.dry_run import describe
from alignx_ds.training import engine

Found = Callable[..., list[str]]
ZERO_KEYS = sorted(DeepSpeedZeroConfig.model_fields)


@pytest.fixture
def found(tmp_path: Path) -> Found:
    """The problems of a JSON (a dict, or the text of the file) for a stage, stage 1 unless another is given."""

    def check(content: Any, key: str = "train", stage: OptimizerConfig | None = None, **others: Any) -> list[str]:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        stage = stage or SpecialistConfig(lr=1e-3, batch=8, accumulation=2, warmup_steps=3, steps=9, clip=0.5)
        stage.deepspeed = str(path)
        settings = {"dtype": "float32", "world_size": 2, "zero_stages": (0, 1, 2, 3), "zero_fix": "lower it"} | others
        problems: list[Problem] = list(StageJson(key, stage, **settings).problems())
        assert all(p.key == f"{key}.deepspeed" and str(path) in str(p.given) for p in problems)
        return [str(p).replace(str(path), "ds.json") for p in problems]

    return check


@pytest.mark.parametrize("name", JSONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_jsons_of_other_tools_are_accepted(found: Found, name: str, dtype: str) -> None:
    assert found(JSONS[name], dtype=dtype) == []
    assert found(JSONS[name], stage=SpecialistConfig(), dtype=dtype, world_size=1) == []


def test_the_shipped_jsons_have_no_problem_and_nothing_without_effect(repo_root: Path, found: Found) -> None:
    for path in (repo_root / "ds_configs").glob("*.json"):
        assert found(path.read_text()) == []
        assert without_effect(json.loads(path.read_text())) == []


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        # what the recipe says too: both are named
        ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps 4", "train.accumulation"]),
        ({"train_batch_size": 16}, ["train_batch_size 16", "8 as in train.batch", "train.batch=16"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["per_gpu 4", "expected 2 = train.batch=8", "train.accumulation=1"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping 1.0", "0.5 as in train.clip"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled true", "model.dtype=float32", "model.dtype=bfloat16"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled true", "model.dtype=float32", "not supported"]),
        ({"optimizer": {"params": {"lr": 1.0}}}, ["optimizer.params.lr 1.0", "0.001 as in train.lr"]),
        ({"optimizer": {"params": {"weight_decay": 1}}}, ["weight_decay 1", "train.weight_decay"]),
        ({"optimizer": {"params": {"max_grad_norm": 1}}}, ["max_grad_norm", "gradient_clipping", "train.clip=0.5"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}}}, ["num_steps 7", "3 as in train.warm"]),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 5}}},
            ["steps 5", "9 as in train.steps"],
        ),
        ({"bf16": {"check_grad_overflow": False}}, ["bf16.check_grad_overflow false", "nonfinite"]),
        # unknown names, with the nearest known one
        (
            {"gradient_acumulation_steps": 2},
            ["gradient_acumulation_steps", "did you mean gradient_accumulation_steps?"],
        ),
        ({"zero_optimisation": {}}, ["did you mean zero_optimization?"]),
        ({"zero_optimization": {"overlap_com": True}}, ["zero_optimization.overlap_com", "did you mean overlap_comm?"]),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, ["offload_optimizer.devise", "mean device?"]),
        ({"optimizer": {"type": "AdamWW"}}, ["optimizer.type 'AdamWW'", "did you mean AdamW?"]),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type 'Lamb'", "Adam or AdamW"]),
        ({"optimizer": {"type": 3}}, ["optimizer.type 3"]),
        ({"optimizer": {"typ": "Adam"}}, ["optimizer.typ", "did you mean type?"]),
        ({"optimizer": {"params": {"beta": [0.9, 0.9]}}}, ["optimizer.params.beta", "did you mean betas?"]),
        ({"scheduler": {"type": "WarmUpLR"}}, ["scheduler.type 'WarmUpLR'", "did you mean WarmupLR?"]),
        ({"scheduler": {"type": "OneCycle"}}, ["scheduler.type 'OneCycle'", "train.warmup_steps=3"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 1}}}, ["params.warmup_steps", "num_steps?"]),
        ({"flops_profiler": {"enable": True}}, ["flops_profiler.enable", "did you mean enabled?"]),
        # wrong types and values
        ({"zero_optimization": True}, ["zero_optimization true", "a JSON object"]),
        ({"zero_optimization": {"stage": "auto"}}, ["ZeRO stage auto"]),
        ({"zero_optimization": {"stage": True}}, ["ZeRO stage True"]),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "large"}}, ["reduce_bucket_size 'large'"]),
        ({"zero_optimization": {"stage": 3, "sub_group_size": -1}}, ["zero_optimization.sub_group_size -1"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, ["offload_optimizer.device 'gpu'"]),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, ["offload_optimizer 'cpu'"]),
        ({"train_batch_size": "8"}, ["train_batch_size '8'"]),
        ({"train_batch_size": True}, ["train_batch_size true"]),
        ({"gradient_clipping": -1}, ["gradient_clipping -1"]),
        ({"optimizer": "AdamW"}, ["optimizer 'AdamW'", "a JSON object"]),
        ({"optimizer": {"params": {"betas": [0.9, 2]}}}, ["betas"]),
        ({"optimizer": {"params": {"betas": ["auto", 0.9]}}}, ["auto at optimizer.params.betas[0]"]),
        ({"optimizer": {"params": {"eps": "small"}}}, ["eps"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cubic"}}}, ["warmup_type 'cubic'"]),
        ({"flops_profiler": {"enabled": True, "output_file": 5}}, ["flops_profiler.output_file 5", "str or null"]),
        ({"flops_profiler": {"profile_step": True}}, ["flops_profiler.profile_step true", "type int"]),
        ({"bf16": {"enabled": "yes please"}}, ["bf16.enabled 'yes please'"]),
        ({"steps_per_print": "often"}, ["steps_per_print 'often'"]),
        ({"communication_data_type": "auto"}, ["auto at communication_data_type"]),
        ({"communication_data_type": "int8"}, ["communication_data_type 'int8'"]),
        # what the run can't do
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["offload_param", "ZeRO stage 3"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["offload_param.device nvme"]),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, ["zero_quantized_gradients true"]),
        ({"pipeline": {"stages": 2}}, ["pipeline", "remove it"]),
        ({"quantize_training": {"enabled": False}}, ["quantize_training", "DeepSpeed 0.19 no longer has it"]),
        ({"compression_training": {}}, ["compression_training", "DeepSpeed 0.19 no longer has it"]),
        ({"sparse_attention": {"mode": "fixed"}}, ["sparse_attention", "no longer has it"]),
        ({"hybrid_engine": {"enabled": True}}, ["hybrid_engine"]),
        ({"autotuning": {"enabled": True}}, ["autotuning"]),
        ({"data_efficiency": {"enabled": True}}, ["data_efficiency", "order of the rows"]),
        ({"activation_checkpointing": {"partition_activations": True}}, ["activation_checkpointing"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op 'sum'", "'mean'"]),
        ({"wandb": {"enabled": True}}, ["wandb.enabled true", "pip install wandb"]),
        ({"comet": {"enabled": True}}, ["comet.enabled true", "pip install comet-ml"]),
    ],
)
def test_one_line_names_what_is_wrong_and_nothing_else(
    found: Found, changes: dict[str, Any], parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignx_ds.plan.deepspeed_json.importlib.util.find_spec", lambda module: None)
    (line,) = found({"zero_optimization": {"stage": 2}} | changes)
    for part in parts:
        assert part in line, line


def test_a_scheduler_beside_a_schedule_of_the_recipe_is_refused(found: Found) -> None:
    block = {"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}
    (line,) = found(block, stage=SpecialistConfig(schedule="linear"))
    assert "scheduler" in line and "train.schedule" in line
    assert found(block, stage=SpecialistConfig()) == []


JUNK = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        0.5,
        1e9,
        float("inf"),
        float("nan"),
        10**400,
        "",
        "auto",
        "cpu",
        "x" * 500,
        [],
        [1],
    ),
    *(
        ["auto"],
        {},
        {"enabled": True},
        {"enabled": "auto"},
        {"device": "cpu"},
        {"a": {"b": 1}},
        {"type": "AdamW"},
        "\x00",
    ),
]


def places(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [(*at, key) for key in node] if isinstance(node, dict) else []
    return found + [place for key in found for place in places(node[key[-1]], key)]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_json_holds_it_is_refused_in_a_line_or_deepspeed_accepts_it(
    found: Found, data: st.DataObject
) -> None:
    spoiled = copy.deepcopy(JSONS[data.draw(st.sampled_from(sorted(JSONS)))])
    for _ in range(data.draw(st.integers(1, 2))):
        new = [(key,) for key in sorted(keys.TOP_LEVEL)] + [("zero_optimization", key) for key in ZERO_KEYS]
        *path, last = data.draw(st.sampled_from(places(spoiled) + new))
        node = spoiled
        for key in path:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        else:
            node[last] = copy.deepcopy(data.draw(st.sampled_from(JUNK)))
    lines = found(spoiled)
    assert all("\n" not in line for line in lines)
    if not lines:
        template, plan = json.loads(json.dumps(spoiled)), engine.Plan.of(SpecialistConfig(), "float32", 9)
        filled = engine.fill(template, plan, 1, 64)
        assert DeepSpeedConfig(filled).train_batch_size == SpecialistConfig().batch
        assert all(isinstance(line, str) for line in without_effect(template))


def test_blocks_that_are_switched_off_are_no_problem(found: Found) -> None:
    none = {"device": "none", "pin_memory": True}
    assert found({"zero_optimization": {"stage": 2, "offload_param": none, "offload_optimizer": none}}) == []
    blocks = ("hybrid_engine", "autotuning", "data_efficiency", "wandb", "comet", "flops_profiler", "torch_autocast")
    assert found({block: {"enabled": False} for block in blocks}) == []
    assert (
        found({"wandb": {"enabled": False}, "csv_monitor": {"enabled": True}, "tensorboard": {"enabled": True}}) == []
    )


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"steps_per_print": 1, "bf16": {}, "steps_per_print": 2}', "steps_per_print twice"),
        ('{"bf16": {"enabled": true, "enabled": "auto"}}', "enabled twice"),
        ("{'bf16': {}}", "line 1, column 2"),
        ('{"bf16": {}} // the end', "line 1, column 14"),
        ("[" * 10_000 + "]" * 10_000, "nested too deeply"),
        ("[1]", "a JSON object"),
        ("", "valid JSON"),
    ],
)
def test_a_file_that_is_no_plain_json_object(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    stage = SpecialistConfig(deepspeed=str(path))
    (problem,) = StageJson("train", stage, "float32", 1, (1,), "").problems()
    assert part in str(problem)


def test_batch_sizes_that_multiply_to_the_recipe_s_are_fine(found: Found) -> None:
    sizes = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    assert found(sizes) == []
    (line,) = found({**sizes, "train_micro_batch_size_per_gpu": 1})
    assert "per_gpu 1" in line and "expected 2 = train.batch=8 / 2 ranks / 2 micro batches" in line
    (line,) = found({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4})
    assert "gradient_accumulation_steps 4" in line and line.endswith("or set train.accumulation=4")
    assert len(found({**sizes, "train_micro_batch_size_per_gpu": 3, "train_batch_size": 12})) == 2


def test_the_mixture_of_experts_needs_what_deepspeed_s_layer_needs(found: Found) -> None:
    zero = {"stage": 2, "contiguous_gradients": False, "reduce_scatter": False}
    settings = {"stage": AlignConfig(), "world_size": 1, "zero_stages": (1, 2)}
    lines = found({"zero_optimization": zero}, "align", **settings)
    assert len(lines) == 2 and "contiguous_gradients" in lines[0] and "reduce_scatter" in lines[1]
    assert found({"zero_optimization": zero}, "baselines.h3fusion", **{**settings, "stage": FusionConfig()}) == []


def test_what_has_no_effect_is_said(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    z0, z3 = (tmp_path / f"{name}.json" for name in ("ds_z0", "ds_z3"))
    z0.write_text(json.dumps({**JSONS["ds_z0"], "vocabulary_size": 99}))
    z3.write_text(json.dumps({**JSONS["ds_z3"], "zero_optimization": {**ZERO3, "stage": 2}}))
    recipe = write_recipe(f"train.deepspeed={z0}", f"baselines.h3fusion.deepspeed={z3}")
    config = parse.load(recipe)
    assert list(training.problems(config, 1)) == []
    said = training.without_effect(config)
    assert [line.split(":")[0] for line in said] == ["train.deepspeed"] * 3 + ["baselines.h3fusion.deepspeed"] * 2
    assert "vocabulary_size has no effect" in said[0] and "round_robin_gradients has no effect" in said[1]
    assert "ZeRO stage 0 runs as stage 1" in said[2]
    assert "stage3_gather_16bit_weights_on_model_save has no effect" in said[3]
    assert "stage3_max_live_parameters" in said[4] and "no effect under ZeRO stage 2" in said[4]
    assert all(line in describe(config, check(config, 1), 1)[0] for line in said)


def test_without_deepspeed_the_rest_is_still_checked(
    found: Found, monkeypatch: pytest.MonkeyPatch, tiny_config: RunConfig
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert found(JSONS["ds_z3_offload"]) == []
    lines = found({"optimizer": AUTO_ADAMW, "gradient_acumulation_steps": 2})
    assert len(lines) == 1 and "did you mean gradient_accumulation_steps?" in lines[0]
    (line,) = found({"zero_optimization": {"stage": 7}})
    assert "ZeRO stage 7" in line
    printed, _ = describe(tiny_config, check(tiny_config, 1), 1)
    assert "zero_optimization and the other blocks: DeepSpeed is missing" in printed and "everything else" in printed
