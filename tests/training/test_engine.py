"""The DeepSpeed JSON after "auto" is filled: golden, accepted by DeepSpeed, and strict about what it does not know."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed_jsons import CPU, JSONS, PRESETS
from torch import nn

from alignx_ds.config.schema import AlignConfig, FusionConfig, ScratchConfig, TrainConfig
from alignx_ds.errors import ConfigError
from alignx_ds.training.engine import Plan, decay_groups, fill, read_template, schedule, settings_of, steps_of

STAGES = {
    "stage1_zero3": TrainConfig(),
    "stage2_moe_zero2": AlignConfig(),
    "scratch_zero1": ScratchConfig().train,
    "fusion_zero2": FusionConfig(),
    **{name: TrainConfig() for name in PRESETS},
}
FILLED = {  # in every stage, from the settings of `plan_of`
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 16,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": True},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 0.003, "weight_decay": 0.07, "betas": [0.9, 0.95], "torch_adam": True, "fused": True},
    },
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 1000000000,
    "wall_clock_breakdown": False,
}
GRADIENTS = {"overlap_comm": False, "contiguous_gradients": True}
OVERLAPPED = {"overlap_comm": True, "contiguous_gradients": True}
LARGE = {"reduce_bucket_size": 200_000_000, "allgather_bucket_size": 200_000_000}
BY_WIDTH = {  # at hidden size 100
    "reduce_bucket_size": 10_000,
    "stage3_prefetch_bucket_size": 9_000,
    "stage3_param_persistence_threshold": 1_000,
}
ZERO: dict[str, dict[str, Any]] = {
    "stage1_zero3": {
        "stage": 3,
        **GRADIENTS,
        "stage3_param_persistence_threshold": 10000,
        "stage3_gather_16bit_weights_on_model_save": False,
    },
    "stage2_moe_zero2": {"stage": 2, **GRADIENTS, "reduce_scatter": True},
    "fusion_zero2": {"stage": 2, **GRADIENTS, "reduce_scatter": True},
    "scratch_zero1": {"stage": 1},
    "zero2_gpu": {"stage": 2, **OVERLAPPED, "reduce_scatter": True, **LARGE},
    "zero3_gpu": {"stage": 3, **OVERLAPPED, **BY_WIDTH},
    "zero2_offload": {"stage": 2, **OVERLAPPED, "reduce_scatter": True, **LARGE, "offload_optimizer": CPU},
    "zero3_offload": {"stage": 3, **OVERLAPPED, **BY_WIDTH, "offload_optimizer": CPU, "offload_param": CPU},
}
GOLDEN: dict[str, dict[str, Any]] = {name: FILLED | {"zero_optimization": zero} for name, zero in ZERO.items()}


def plan_of(stage: TrainConfig | AlignConfig | FusionConfig, dtype: str = "bfloat16") -> Plan:
    stage = copy.copy(stage)
    stage.lr, stage.batch, stage.accumulation, stage.clip, stage.weight_decay = 0.003, 64, 2, 0.5, 0.07
    return Plan.of(stage, dtype, 100)


def template(name: str) -> dict[str, Any]:
    return read_template(f"ds_configs/{name}.json", "train.deepspeed")


def autos(node: Any) -> int:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return (node == "auto") + sum(map(autos, children))


def test_every_shipped_file_is_in_the_golden_table(repo_root: Path) -> None:
    assert {path.stem for path in (repo_root / "ds_configs").glob("*.json")} == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_filled_file_is_golden(name: str) -> None:
    empty = template(name)
    before = copy.deepcopy(empty)
    assert autos(empty) > 0
    filled = fill(empty, plan_of(STAGES[name]), world_size=2, hidden_size=100)
    assert filled == GOLDEN[name]
    assert autos(filled) == 0
    assert empty == before, "the template itself is not changed"
    assert json.loads(json.dumps(filled)) == filled


def test_the_batch_sizes_multiply_at_any_world_size() -> None:
    for world_size in (1, 2, 4, 8):
        filled = fill(template("stage1_zero3"), plan_of(TrainConfig()), world_size)
        micro, accumulation = filled["train_micro_batch_size_per_gpu"], filled["gradient_accumulation_steps"]
        assert micro * accumulation * world_size == filled["train_batch_size"] == 64


@pytest.mark.parametrize(
    ("name", "dtype", "bf16"), [*((name, "bfloat16", True) for name in GOLDEN), ("stage1_zero3", "float32", False)]
)
def test_deepspeed_accepts_the_filled_file(name: str, dtype: str, bf16: bool) -> None:
    read = DeepSpeedConfig(fill(template(name), plan_of(STAGES[name], dtype), 1, hidden_size=100))
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (64, 32, 2)
    assert read.zero_optimization_stage == GOLDEN[name]["zero_optimization"]["stage"]
    assert read.gradient_clipping == 0.5
    assert read.bfloat16_config.enabled is bf16
    assert read.optimizer_params["lr"] == 0.003


def test_what_the_user_wrote_stays_and_what_is_left_out_comes_from_the_recipe() -> None:
    own = {"optimizer": {"type": "Adam", "params": {"lr": 1.0}}, "gradient_clipping": 9.0, "steps_per_print": 7}
    filled = fill(own, plan_of(TrainConfig()), world_size=2)
    assert (filled["gradient_clipping"], filled["optimizer"]["type"], filled["steps_per_print"]) == (9.0, "Adam", 7)
    params = filled["optimizer"]["params"]
    assert params == {**GOLDEN["stage1_zero3"]["optimizer"]["params"], "lr": 1.0}
    assert filled["zero_optimization"] == {"stage": 1}, "ZeRO-0, whose results are those of ZeRO-1"
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16"):
        assert filled[name] == GOLDEN["stage1_zero3"][name]
    kept = fill({"optimizer": {"params": {"torch_adam": False}}}, plan_of(TrainConfig()), 2)["optimizer"]["params"]
    assert kept["torch_adam"] is False and "fused" not in kept, "which is torch's"
    sgd = fill({"optimizer": {"type": "SGD", "params": {}}}, plan_of(TrainConfig()), 2)["optimizer"]["params"]
    assert sgd == {"lr": 0.003, "weight_decay": 0.07}


def test_auto_buckets_are_those_of_the_trainer() -> None:
    filled = fill(JSONS["ds_z3"], plan_of(TrainConfig()), 2, hidden_size=100)
    zero = filled["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (10_000, 9_000)
    assert (zero["stage3_param_persistence_threshold"], zero["sub_group_size"]) == (1_000, 1e9)
    assert filled["fp16"]["enabled"] is False
    left = fill({"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}}, plan_of(TrainConfig()), 2)
    assert left["zero_optimization"] == {"stage": 2}, "DeepSpeed's own default"


@pytest.mark.parametrize("name", JSONS)
def test_deepspeed_accepts_the_jsons_of_other_tools(name: str) -> None:
    filled = fill(JSONS[name], plan_of(TrainConfig()), 1, hidden_size=64)
    assert autos(filled) == 0
    read = DeepSpeedConfig(filled)
    assert (read.train_batch_size, read.gradient_clipping, read.optimizer_params["lr"]) == (64, 0.5, 0.003)
    assert read.zero_optimization_stage == (JSONS[name].get("zero_optimization", {}).get("stage") or 1)


@pytest.mark.parametrize(
    ("extra", "path"),
    [
        ({"communication_data_type": "auto"}, "communication_data_type"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": ["auto", 0.95]}}}, "optimizer.params.betas"),
    ],
)
def test_an_auto_without_a_value_is_refused_with_its_path(extra: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        fill(template("stage1_zero3") | extra, plan_of(TrainConfig()), world_size=1)


def test_a_stage_depends_on_what_its_json_means_and_not_on_how_it_is_written(tmp_path: Path) -> None:
    def settings(content: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / "ds.json").write_text(json.dumps(content))
        return settings_of(str(tmp_path / "ds.json"), "train.deepspeed")

    shipped = settings(template("stage1_zero3"))
    assert shipped == settings({}) == settings(JSONS["ds_z3_offload"]) == settings(JSONS["no_optimizer"])
    assert settings({"optimizer": {"type": "adamw", "params": {"lr": 0.003, "betas": "auto"}}}) == shipped
    assert settings({"optimizer": {"params": {"betas": [0.9, 0.999]}}}) != shipped
    assert settings({"scheduler": {"type": "WarmupLR"}}) != shipped
    assert settings({"communication_data_type": "fp32"}) != shipped


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff"])
def test_a_file_that_is_no_json_object_is_refused_under_its_key(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_template(str(path), "align.deepspeed")
    assert [(p.key, p.given) for p in error.value.problems] == [("align.deepspeed", str(path))]


def test_shipped_files_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = template("stage1_zero3")
    monkeypatch.chdir(tmp_path)
    assert template("stage1_zero3") == here
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs/stage1_zero3.json").write_text('{"mine": 1}')
    assert template("stage1_zero3") == {"mine": 1}  # a path as given comes first
    with pytest.raises(ConfigError, match=r"train\.deepspeed"):
        read_template("ds_configs/nowhere.json", "train.deepspeed")


def test_a_plan_takes_its_numbers_from_its_stage() -> None:
    stage = AlignConfig(lr=0.1, batch=24, accumulation=3, steps=7, warmup_steps=2, weight_decay=0.2, clip=0.3)
    plan = Plan.of(stage, "float32", 7)
    assert plan == Plan(0.1, 24, 3, 7, 2, 0.2, 0.3, bf16=False)
    assert plan.micro_batch(world_size=4) == 2
    assert replace(plan, steps=21) == Plan(0.1, 24, 3, 21, 2, 0.2, 0.3, bf16=False)


@pytest.mark.parametrize(
    ("epochs", "steps", "rows", "expected"),
    [(3.0, 0, 640, 30), (3.0, 0, 641, 31), (0.5, 0, 640, 5), (1.0, 0, 3, 1), (0.001, 0, 64, 1), (3.0, 7, 640, 7)],
)
def test_epochs_become_steps_unless_those_are_given(epochs: float, steps: int, rows: int, expected: int) -> None:
    assert steps_of(TrainConfig(epochs=epochs, steps=steps, batch=64), rows) == expected


@pytest.mark.parametrize(("steps", "warmup"), [(10, 4), (10, 0), (10, 10), (3, 8)])
def test_the_rate_warms_up_and_falls_to_a_tenth(steps: int, warmup: int) -> None:
    plan = Plan(1.0, 1, 1, steps, warmup, 0.0, 1.0, bf16=False)
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.AdamW(groups)
    scheduler = schedule(plan)(optimizer)
    for step in range(steps + 1):
        done = (step - warmup) / max(1, steps - warmup)
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * min(1, done))) / 2
        expected = (step + 1) / warmup if step < warmup else cosine
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([expected, 0.1 * expected])
        optimizer.step()
        scheduler.step()


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    matrices, vectors = decay_groups(list(model.named_parameters()), 0.1)
    assert [p.shape for p in matrices["params"]] == [(3, 3)]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert len(vectors["params"]) == 3
    model[0].weight.requires_grad_(False)
    assert [g["name"] for g in decay_groups(list(model.named_parameters()), 0.1)] == ["vectors"]
