"""What is wrong with the optimizer and the scheduler of a DeepSpeed JSON, beside the recipe's keys of the stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from alignx_ds.config.choices import COSINE_TO_TENTH
from alignx_ds.config.schema import OptimizerConfig
from alignx_ds.plan.deepspeed_keys import Fault, is_number, nearest, unknown
from alignx_ds.training.engine import AUTO
from alignx_ds.training.schedules import DEEPSPEED_SCHEDULERS

OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW"}
NUMBERS = frozenset({"lr", "betas", "eps", "weight_decay"})
OF_TORCH = NUMBERS | {"amsgrad", "fused"}
OF_DEEPSPEED = NUMBERS | {"amsgrad", "bias_correction", "set_grad_none", "fp32_optimizer_states"}
MODES = frozenset({"torch_adam", "adam_w_mode"})


def optimizer_faults(block: dict[str, Any], stage: OptimizerConfig, key: str) -> Iterator[Fault]:
    """Of the block `optimizer`, {} where there is none; `key` is the stage's in the recipe."""
    kind, params = block.get("type", "AdamW"), block.get("params", {})
    if not isinstance(kind, str) or kind.lower() not in OPTIMIZERS:
        fix = nearest(str(kind), OPTIMIZERS.values(), "remove the block: the recipe's is AdamW")
        yield f"optimizer.type {kind!r}", "Adam or AdamW, whose states the checkpoints of all ranks can hold", fix
        return
    of_torch = bool(params.get("torch_adam", True))
    known = MODES | (OF_TORCH if of_torch else OF_DEEPSPEED)
    for name in sorted(params.keys() - known):
        if name == "max_grad_norm":
            fix = f"remove it: {key}.clip={stage.clip} is the greatest norm"
            yield "optimizer.params.max_grad_norm", f"gradient_clipping and {key}.clip alone", fix
        else:
            yield unknown(f"optimizer.params.{name}", known)
    for name, wanted in (("lr", stage.lr), ("weight_decay", stage.weight_decay)):
        yield from _agrees(f"optimizer.params.{name}", params.get(name, AUTO), wanted, f"{key}.{name}")
    for name in sorted((known - NUMBERS) & params.keys()):
        if not isinstance(params[name], bool) and params[name] != AUTO:
            yield f"optimizer.params.{name} {params[name]!r}", "true or false", "correct it"
    betas, eps = params.get("betas", AUTO), params.get("eps", AUTO)
    is_pair = isinstance(betas, list) and len(betas) == 2
    if betas != AUTO and not (is_pair and all(beta == AUTO or (is_number(beta) and 0 <= beta < 1) for beta in betas)):
        yield f"optimizer.params.betas {betas!r}", "two numbers from 0 to below 1", "correct them"
    if eps != AUTO and not (is_number(eps) and eps > 0):
        yield f"optimizer.params.eps {eps!r}", "a number above 0", "correct it"


def scheduler_faults(block: dict[str, Any], stage: OptimizerConfig, key: str) -> Iterator[Fault]:
    """Of the block `scheduler`, {} where there is none."""
    if not block:
        return
    if stage.schedule != COSINE_TO_TENTH:
        fix = f"remove the block, or {key}.schedule={stage.schedule}"
        yield "scheduler", f"none where {key}.schedule names another", fix
        return
    kind, params = block.get("type"), block.get("params", {})
    known = DEEPSPEED_SCHEDULERS.get(kind) if isinstance(kind, str) else None
    own = f"{key}.warmup_steps={stage.warmup_steps} and a cosine"
    if known is None:
        fix = nearest(str(kind), DEEPSPEED_SCHEDULERS, f"remove the block: the recipe's is {own}")
        yield f"scheduler.type {kind!r}", f"one of {', '.join(DEEPSPEED_SCHEDULERS)}", fix
        return
    for name in sorted(params.keys() - known.keys()):
        yield unknown(f"scheduler.params.{name}", known)
    for name, wanted, what in (
        ("warmup_max_lr", stage.lr, f"{key}.lr"),
        ("warmup_num_steps", stage.warmup_steps, f"{key}.warmup_steps"),
        ("total_num_steps", getattr(stage, "steps", 0) or AUTO, f"{key}.steps"),
    ):
        if name in known:
            yield from _agrees(f"scheduler.params.{name}", params.get(name, AUTO), wanted, what)
    if params.get("warmup_type", "log") not in ("log", "linear"):
        yield f"scheduler.params.warmup_type {params['warmup_type']!r}", "log or linear", "correct it"
    for name, most in (("warmup_min_lr", stage.lr), ("warmup_min_ratio", 1.0), ("cos_min_ratio", 1.0)):
        value = params.get(name, AUTO)
        if name in known and value != AUTO and not (is_number(value) and 0 <= value <= most):
            yield f"scheduler.params.{name} {value!r}", f"a number from 0 to {most}", "correct it"


def _agrees(place: str, value: Any, wanted: Any, what: str) -> Iterator[Fault]:
    if value != AUTO and (isinstance(value, bool) or value != wanted):
        expected = f"{wanted} as in {what}" if wanted != AUTO else f'"auto": {what} is 0, so the epochs say it'
        yield f"{place} {value!r}", expected, f'write "auto" there, or set {what}={value}'
