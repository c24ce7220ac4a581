"""A DeepSpeed engine from a JSON file whose "auto" values are filled from the recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from alignx_ds.config import AlignConfig, FusionConfig, TrainConfig
from alignx_ds.errors import ConfigError, Problem

AUTO = "auto"
MERELY_HOW = frozenset(
    {
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "steps_per_print",
        "wall_clock_breakdown",
        "comms_logger",
        "flops_profiler",
        "tensorboard",
    }
)


@dataclass(frozen=True)
class Plan:
    """What a training stage asks of its engine."""

    lr: float
    batch: int
    accumulation: int
    steps: int
    warmup_steps: int
    weight_decay: float
    clip: float
    bf16: bool

    @classmethod
    def of(cls, stage: TrainConfig | AlignConfig | FusionConfig, dtype: str, steps: int) -> Plan:
        shared = ("lr", "batch", "accumulation", "warmup_steps", "weight_decay", "clip")
        return cls(**{name: getattr(stage, name) for name in shared}, steps=steps, bf16=dtype == "bfloat16")

    def micro_batch(self, world_size: int) -> int:
        return self.batch // (world_size * self.accumulation)


def steps_of(stage: TrainConfig, rows: int) -> int:
    """How many optimizer steps a fine-tune on so many rows takes: as many as its epochs need, unless it names them."""
    return stage.steps or max(1, math.ceil(stage.epochs * rows / stage.batch))


FILLED: dict[str, Callable[[Plan, int], Any]] = {
    "train_batch_size": lambda plan, world: plan.batch,
    "train_micro_batch_size_per_gpu": lambda plan, world: plan.micro_batch(world),
    "gradient_accumulation_steps": lambda plan, world: plan.accumulation,
    "gradient_clipping": lambda plan, world: plan.clip,
    "bf16.enabled": lambda plan, world: plan.bf16,
    "optimizer.params.lr": lambda plan, world: plan.lr,
    "optimizer.params.weight_decay": lambda plan, world: plan.weight_decay,
    "optimizer.params.fused": lambda plan, world: torch.cuda.is_available(),  # torch's own: one pass over the states
}


def _replace_auto(node: Any, path: str, value_at: Callable[[str], Any]) -> Any:
    if isinstance(node, dict):
        return {k: _replace_auto(v, f"{path}.{k}" if path else k, value_at) for k, v in node.items()}
    if isinstance(node, list):
        return [_replace_auto(v, f"{path}[{i}]", value_at) for i, v in enumerate(node)]
    return value_at(path) if node == AUTO else node


def unfilled(template: dict[str, Any]) -> list[str]:
    """Where the template says "auto" and nothing knows the value."""
    places: list[str] = []
    _replace_auto(template, "", places.append)
    return [path for path in places if path not in FILLED]


def fill(template: dict[str, Any], plan: Plan, world_size: int) -> dict[str, Any]:
    """The template with every "auto" replaced; a value that is not "auto" is left as the user wrote it."""
    places = unfilled(template)
    if places:
        mend = f"write a value; only {', '.join(FILLED)} can be {AUTO}"
        raise ConfigError(Problem(f"deepspeed config, {', '.join(places)}", AUTO, "a value", mend))
    result = _replace_auto(template, "", lambda path: FILLED[path](plan, world_size))
    assert isinstance(result, dict)
    return result


def read_template(path: str, key: str) -> dict[str, Any]:
    """The DeepSpeed JSON of a stage. Raises ConfigError under the given key."""
    try:
        template = json.loads(resolve(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(Problem(key, path, "a DeepSpeed JSON file", f"check the path ({error.strerror})")) from error
    except UnicodeDecodeError as error:
        raise ConfigError(Problem(key, path, "UTF-8 text", f"re-encode it (byte {error.start})")) from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(Problem(key, path, "valid JSON", f"mend {where}: {error.msg}")) from error
    if not isinstance(template, dict):
        raise ConfigError(Problem(key, path, "a JSON object", "see ds_configs/ for examples"))
    return template


def settings_of(path: str, key: str) -> dict[str, Any]:
    """What a job's result depends on of its DeepSpeed JSON: not how the work is spread, sharded and logged."""
    return {name: value for name, value in read_template(path, key).items() if name not in MERELY_HOW}


def resolve(path: str) -> Path:
    """A path as given, or else relative to the project, so recipes work from any directory."""
    given = Path(path)
    return given if given.exists() else Path(__file__).parents[2] / path


def schedule(plan: Plan) -> Any:
    """Linear warm-up, then a cosine to a tenth; a factory, so that each parameter group keeps its own rate."""

    def factor(step: int) -> float:
        if step < plan.warmup_steps:
            return (step + 1) / plan.warmup_steps
        done = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))

    return lambda optimizer: LambdaLR(optimizer, factor)


def start(model: nn.Module, groups: list[dict[str, Any]], config: dict[str, Any], plan: Plan) -> Any:
    """`deepspeed.initialize` with the filled config, our schedule and these parameter groups."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=groups, config=config, lr_scheduler=schedule(plan), dist_init_required=False
    )
    # Off unless fp16, and then a NaN goes into the weights; with experts apart the ranks would not even agree on it.
    engine.optimizer.check_grad_overflow = True
    return engine


def decay_groups(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only. Empty groups are left out: DeepSpeed fails on them."""
    trained = [p for _, p in named if p.requires_grad]

    def is_matrix(p: nn.Parameter) -> bool:
        return len(getattr(p, "ds_shape", p.shape)) > 1

    groups = [
        {"params": [p for p in trained if is_matrix(p)], "weight_decay": weight_decay, "name": "matrices"},
        {"params": [p for p in trained if not is_matrix(p)], "weight_decay": 0.0, "name": "vectors"},
    ]
    return [group for group in groups if group["params"]]


def dtype_of(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
