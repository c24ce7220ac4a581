"""A DeepSpeed engine from a JSON file whose "auto" values are filled from the recipe.

https://www.deepspeed.ai/docs/config-json describes the file; transformers' Trainer uses "auto" in the same way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from alignx_ds.config.schema import OptimizerConfig, TrainConfig
from alignx_ds.config.shipped import deepspeed_file
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.runtime.deepspeed import load_deepspeed

AUTO = "auto"
EXECUTION_ONLY = frozenset(  # keys that say how the work is sharded, spread and logged: the result is the same
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
    """The numbers of one training stage."""

    lr: float  # at its peak
    batch: int  # rows of an optimizer step, over all ranks
    accumulation: int  # micro batches of a rank in an optimizer step
    steps: int  # optimizer steps
    warmup_steps: int
    weight_decay: float  # of matrices
    clip: float  # greatest norm of the gradient
    bf16: bool  # bf16 weights with fp32 masters; otherwise fp32

    @classmethod
    def of(cls, stage: OptimizerConfig, dtype: str, steps: int) -> Plan:
        """Of the recipe's section of a stage, and the recipe's `model.dtype`."""
        shared = {f.name for f in fields(OptimizerConfig)} & {f.name for f in fields(cls)}
        return cls(**{name: getattr(stage, name) for name in shared}, steps=steps, bf16=dtype == "bfloat16")

    def micro_batch(self, world_size: int) -> int:
        """Rows of one rank's micro batch; the recipe's check has made sure that the batch divides."""
        return self.batch // (world_size * self.accumulation)


def steps_of(stage: TrainConfig, rows: int) -> int:
    """Optimizer steps of a fine-tune on so many rows: `stage.steps`, or when that is 0 what its epochs need."""
    return stage.steps or max(1, math.ceil(stage.epochs * rows / stage.batch))


FILLED: dict[str, Callable[[Plan, int], Any]] = {
    "train_batch_size": lambda plan, world: plan.batch,
    "train_micro_batch_size_per_gpu": lambda plan, world: plan.micro_batch(world),
    "gradient_accumulation_steps": lambda plan, world: plan.accumulation,
    "gradient_clipping": lambda plan, world: plan.clip,
    "bf16.enabled": lambda plan, world: plan.bf16,
    "optimizer.params.lr": lambda plan, world: plan.lr,
    "optimizer.params.weight_decay": lambda plan, world: plan.weight_decay,
    "optimizer.params.fused": lambda plan, world: torch.cuda.is_available(),  # one pass over the states
}


def _replace_auto(node: Any, path: str, value_at: Callable[[str], Any]) -> Any:
    if isinstance(node, dict):
        return {k: _replace_auto(v, f"{path}.{k}" if path else k, value_at) for k, v in node.items()}
    if isinstance(node, list):
        return [_replace_auto(v, f"{path}[{i}]", value_at) for i, v in enumerate(node)]
    return value_at(path) if node == AUTO else node


def unfilled(template: dict[str, Any]) -> list[str]:
    """Dotted paths of the template's "auto" values that the recipe has no value for."""
    places: list[str] = []
    _replace_auto(template, "", places.append)
    return [path for path in places if path not in FILLED]


def fill(template: dict[str, Any], plan: Plan, world_size: int) -> dict[str, Any]:
    """A copy of the template with every "auto" replaced; other values stay as the user wrote them.

    Raises ConfigError naming every "auto" that can't be filled.
    """
    places = unfilled(template)
    if places:
        fix = f"write a value; only {', '.join(FILLED)} can be {AUTO}"
        raise ConfigError(Problem(f"deepspeed config, {', '.join(places)}", AUTO, "a value", fix))
    result = _replace_auto(template, "", lambda path: FILLED[path](plan, world_size))
    assert isinstance(result, dict)
    return result


def read_template(path: str, key: str) -> dict[str, Any]:
    """The DeepSpeed JSON of a stage. Raises ConfigError under the recipe's `key` when it is no JSON object."""
    try:
        template = json.loads(deepspeed_file(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(Problem(key, path, "a DeepSpeed JSON file", f"check the path ({error.strerror})")) from error
    except UnicodeDecodeError as error:
        raise ConfigError(Problem(key, path, "UTF-8 text", f"re-encode it (byte {error.start})")) from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(Problem(key, path, "valid JSON", f"fix {where}: {error.msg}")) from error
    if not isinstance(template, dict):
        raise ConfigError(Problem(key, path, "a JSON object", "see ds_configs/ for examples"))
    return template


def settings_of(path: str, key: str) -> dict[str, Any]:
    """Those settings of a stage's DeepSpeed JSON that its result depends on. Raises ConfigError as `read_template`."""
    return {name: value for name, value in read_template(path, key).items() if name not in EXECUTION_ONLY}


def schedule(plan: Plan) -> Any:
    """A function that gives an optimizer its schedule: linear warm-up to the peak, then a cosine to a tenth of it.

    The first step has 1/warmup_steps of the peak, the last warm-up step all of it. Every parameter group scales its
    own rate. (transformers' get_cosine_with_min_lr_schedule_with_warmup begins at 0, a step without effect.)
    """

    def factor(step: int) -> float:
        if step < plan.warmup_steps:
            return (step + 1) / plan.warmup_steps
        done = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))

    return lambda optimizer: LambdaLR(optimizer, factor)


def start(model: nn.Module, groups: list[dict[str, Any]], config: dict[str, Any], plan: Plan) -> Any:
    """A DeepSpeed engine of the model: the filled config, the plan's schedule, these parameter groups. Collective."""
    engine, *_ = load_deepspeed().initialize(
        model=model, model_parameters=groups, config=config, lr_scheduler=schedule(plan), dist_init_required=False
    )
    # DeepSpeed checks gradients for NaN under fp16 alone. Without the check NaN goes into the weights, and with expert
    # parallelism into those of some ranks only.
    engine.optimizer.check_grad_overflow = True
    return engine


def decay_groups(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """The optimizer's parameter groups of the trainable parameters: matrices with weight decay, vectors without.

    Empty groups are left out: DeepSpeed fails on them.
    """
    trained = [p for _, p in named if p.requires_grad]

    def is_matrix(p: nn.Parameter) -> bool:
        return len(getattr(p, "ds_shape", p.shape)) > 1

    groups = [
        {"params": [p for p in trained if is_matrix(p)], "weight_decay": weight_decay, "name": "matrices"},
        {"params": [p for p in trained if not is_matrix(p)], "weight_decay": 0.0, "name": "vectors"},
    ]
    return [group for group in groups if group["params"]]
