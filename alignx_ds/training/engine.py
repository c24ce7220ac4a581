"""A DeepSpeed engine from a JSON file whose "auto" values are filled from the recipe.

https://www.deepspeed.ai/docs/config-json describes the file; transformers' Trainer uses "auto" in the same way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from alignx_ds.config.choices import COSINE_TO_TENTH
from alignx_ds.config.schema import OptimizerConfig, TrainConfig
from alignx_ds.config.shipped import deepspeed_file
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.runtime.deepspeed import forget, load_deepspeed
from alignx_ds.training.schedules import DEEPSPEED_SCHEDULERS, named, of_deepspeed

AUTO = "auto"
EXECUTION_ONLY = frozenset(  # keys that say how the work is sharded, spread and logged: the result is the same
    {
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "disable_python_gc",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "log_level",
        "comms_logger",
        "flops_profiler",
        "tensorboard",
        "wandb",
        "csv_monitor",
        "comet",
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
    schedule: str = COSINE_TO_TENTH  # of the learning rate

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


ADAM = {"betas": [0.9, 0.95], "eps": 1e-8, "torch_adam": True}  # DeepSpeed's own Adams are compiled at first use
Value = Callable[..., Any]  # takes the plan, the world size and the model's hidden size
BUCKETS = frozenset(  # sizes that transformers' Trainer derives from the hidden size, by the same formulas
    {"reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"}
)
FILLED: dict[str, Value] = {
    "train_batch_size": lambda plan, world, hidden: plan.batch,
    "train_micro_batch_size_per_gpu": lambda plan, world, hidden: plan.micro_batch(world),
    "gradient_accumulation_steps": lambda plan, world, hidden: plan.accumulation,
    "gradient_clipping": lambda plan, world, hidden: plan.clip,
    "bf16.enabled": lambda plan, world, hidden: plan.bf16,
    "fp16.enabled": lambda plan, world, hidden: False,
    "zero_optimization.reduce_bucket_size": lambda plan, world, hidden: hidden * hidden,
    "zero_optimization.stage3_prefetch_bucket_size": lambda plan, world, hidden: int(0.9 * hidden * hidden),
    "zero_optimization.stage3_param_persistence_threshold": lambda plan, world, hidden: 10 * hidden,
    "optimizer.params.lr": lambda plan, world, hidden: plan.lr,
    "optimizer.params.weight_decay": lambda plan, world, hidden: plan.weight_decay,
    **{f"optimizer.params.{name}": lambda plan, world, hidden, value=value: value for name, value in ADAM.items()},
    "optimizer.params.fused": lambda plan, world, hidden: True,  # one pass over the states, on a CPU too
    "scheduler.params.warmup_min_lr": lambda plan, world, hidden: 0.0,
    "scheduler.params.warmup_max_lr": lambda plan, world, hidden: plan.lr,
    "scheduler.params.warmup_num_steps": lambda plan, world, hidden: plan.warmup_steps,
    "scheduler.params.total_num_steps": lambda plan, world, hidden: plan.steps,
}
OTHERS = frozenset({"optimizer", "scheduler", "communication_data_type"})
FROM_RECIPE = frozenset(  # the values that a recipe's own keys hold, so that they are in a stage's provenance already
    {"train_batch_size", "gradient_clipping", "bf16", "fp16"}
)
PASSED_ON = (
    EXECUTION_ONLY | FROM_RECIPE | OTHERS
)  # to DeepSpeed; no other key of a JSON that passes the checks has an effect


def _replace_auto(node: Any, path: str, value_at: Callable[[str], Any]) -> Any:
    if isinstance(node, dict):
        return {k: _replace_auto(v, f"{path}.{k}" if path else k, value_at) for k, v in node.items()}
    if isinstance(node, list):
        return [_replace_auto(v, f"{path}[{i}]", value_at) for i, v in enumerate(node)]
    return value_at(path) if node == AUTO else node


def completed(template: dict[str, Any]) -> dict[str, Any]:
    """A copy of the template with "auto" for what it leaves out and the recipe has, and as ZeRO-1 where it says 0.

    ZeRO-0 computes what ZeRO-1 does, but has no partitioned fp32 state, which checkpoints are made of. Nor can they be
    made with round-robin gradients: DeepSpeed 0.19 then looks for a parameter's state where another's is. An "auto" in
    zero_optimization that is none of BUCKETS is left to DeepSpeed, as DeepSpeed does itself.
    """
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero: dict[str, Any] = {
        k: v for k, v in template.get("zero_optimization", {}).items() if v != AUTO or k in BUCKETS | {"stage"}
    }
    zero.pop("round_robin_gradients", None)
    optimizer = {"type": "AdamW", **template.get("optimizer", {})}
    of_recipe = ("lr", "weight_decay", *(("betas", "torch_adam") if _is_adam(optimizer) else ()))
    params = {**dict.fromkeys(of_recipe, AUTO), **optimizer.get("params", {})}
    if params.get("torch_adam"):
        params.setdefault("fused", AUTO)
    made = {
        **dict.fromkeys(sizes, AUTO),
        "bf16": {"enabled": AUTO},
        **{name: value for name, value in template.items() if name in PASSED_ON},
        "zero_optimization": {**zero, "stage": zero.get("stage", 0) or 1},
        "optimizer": {**optimizer, "params": params},
    }
    if scheduler := template.get("scheduler"):
        known = DEEPSPEED_SCHEDULERS.get(str(scheduler.get("type")), {})
        defaults = {name: AUTO if value is None else value for name, value in known.items()}
        made["scheduler"] = {**scheduler, "params": {**defaults, **scheduler.get("params", {})}}
    return made


def _is_adam(optimizer: dict[str, Any]) -> bool:
    return str(optimizer["type"]).lower() in ("adam", "adamw")


def unfilled(template: dict[str, Any]) -> list[str]:
    """Dotted paths of the template's "auto" values that the recipe has no value for."""
    places: list[str] = []
    _replace_auto(completed(template), "", places.append)
    return [path for path in places if path not in FILLED]


def fill(template: dict[str, Any], plan: Plan, world_size: int, hidden_size: int = 0) -> dict[str, Any]:
    """The completed template with every "auto" replaced; other values stay as the user wrote them.

    `hidden_size` is the model's, for the sizes of buckets. Raises ConfigError naming every "auto" that can't be filled.
    """
    if places := unfilled(template):
        fix = f"write a value; only {', '.join(FILLED)} can be {AUTO}"
        raise ConfigError(Problem(f"deepspeed config, {', '.join(places)}", AUTO, "a value", fix))
    whole = completed(template)
    assert hidden_size or not any(whole["zero_optimization"].get(name) == AUTO for name in BUCKETS)
    result = _replace_auto(whole, "", lambda path: FILLED[path](plan, world_size, hidden_size))
    assert isinstance(result, dict)
    return result


def read_template(path: str, key: str) -> dict[str, Any]:
    """The DeepSpeed JSON of a stage. Raises ConfigError under the recipe's `key` when it is no JSON object."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = sorted({name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1})
        if twice:
            given, fix = f"{path} ({', '.join(twice)} twice)", "remove one of the two: only the last would count"
            raise ConfigError(Problem(key, given, "each key once", fix))
        return dict(pairs)

    try:
        template = json.loads(deepspeed_file(path).read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except OSError as error:
        raise ConfigError(Problem(key, path, "a DeepSpeed JSON file", f"check the path ({error.strerror})")) from error
    except UnicodeDecodeError as error:
        raise ConfigError(Problem(key, path, "UTF-8 text", f"re-encode it (byte {error.start})")) from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(Problem(key, path, "valid JSON", f"fix {where}: {error.msg}")) from error
    except RecursionError as error:
        raise ConfigError(Problem(key, path, "a DeepSpeed JSON file", "its brackets are nested too deeply")) from error
    if not isinstance(template, dict):
        raise ConfigError(Problem(key, path, "a JSON object", "see ds_configs/ for examples"))
    return template


def settings_of(path: str, key: str) -> dict[str, Any]:
    """Those settings of a stage's DeepSpeed JSON that its result depends on and that the recipe's own keys do not hold.

    What a JSON leaves out counts like "auto". Raises ConfigError as `read_template`.
    """
    whole = completed(read_template(path, key))
    adam = {name: ADAM.get(name) if value == AUTO else value for name, value in whole["optimizer"]["params"].items()}
    of_recipe = ("lr", "weight_decay", "fused")  # fused is the same update in one pass
    params = {name: value for name, value in adam.items() if name not in of_recipe}
    whole["optimizer"] = {**whole["optimizer"], "type": whole["optimizer"]["type"].lower(), "params": params}
    return {name: value for name, value in whole.items() if name not in EXECUTION_ONLY | FROM_RECIPE}


def schedule(plan: Plan, asked: dict[str, Any] | None = None) -> Any:
    """A function that gives an optimizer its schedule: the filled JSON's `scheduler`, otherwise the plan's.

    Every parameter group scales its own rate.
    """
    own = named(plan.schedule, plan.warmup_steps, plan.steps)
    factor = of_deepspeed(asked["type"], asked["params"]) if asked else own
    return lambda optimizer: LambdaLR(optimizer, factor)


def start(model: nn.Module, groups: list[dict[str, Any]], config: dict[str, Any], plan: Plan) -> Any:
    """A DeepSpeed engine of the model: the filled config, its schedule or the plan's, these groups. Collective."""
    planned = schedule(plan, config.get("scheduler"))
    engine, *_ = load_deepspeed().initialize(
        model=model, model_parameters=groups, config=config, lr_scheduler=planned, dist_init_required=False
    )
    # DeepSpeed checks gradients for NaN under fp16 alone. Without the check NaN goes into the weights, and with expert
    # parallelism into those of some ranks only.
    engine.optimizer.check_grad_overflow = True
    return engine


def end(engine: Any) -> None:
    """Destroy an engine so that it, its model, the fp32 masters and the gradients are garbage once nobody uses them.

    A run trains about ten models in one process. The objects also refer to each other, so memory comes back in
    `memory.free`, not here.
    """
    engine.destroy()
    forget(engine.module)


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
