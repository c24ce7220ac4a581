"""Every problem of a stage's DeepSpeed JSON, and what in it has no effect: nothing is ignored in silence.

A value that the recipe has too must be the same: which of the two is meant can not be guessed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from alignx_ds.config.schema import AlignConfig, OptimizerConfig
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.plan import deepspeed_keys as keys
from alignx_ds.plan.deepspeed_keys import Fault, is_number, unknown
from alignx_ds.plan.deepspeed_optimizer import optimizer_faults, scheduler_faults
from alignx_ds.training import engine as engines
from alignx_ds.training.engine import AUTO


@dataclass(frozen=True)
class StageJson:
    """A stage's DeepSpeed JSON beside what the recipe says of the same things."""

    key: str  # of the stage's settings in the recipe, e.g. train
    settings: OptimizerConfig
    dtype: str  # model.dtype
    world_size: int
    zero_stages: tuple[int, ...]  # that the stage can run under
    zero_fix: str

    def problems(self) -> Iterator[Problem]:
        """All of them; those of the file itself alone if there are any."""
        key, path = f"{self.key}.deepspeed", self.settings.deepspeed
        try:
            template = engines.read_template(path, key)
        except ConfigError as error:
            yield from error.problems
            return
        faults = [*_names(template), *_shapes(template)]
        if not faults:
            faults = [*self._agreement(template), *_blocks(template), *_monitors(template), *self._zero(template)]
        yield from (Problem(key, f"{path} ({given})", allowed, fix) for given, allowed, fix in faults)

    def _agreement(self, template: dict[str, Any]) -> Iterator[Fault]:
        stage, key = self.settings, self.key
        yield from _same("train_batch_size", template, stage.batch, f"{key}.batch")
        yield from _same("gradient_accumulation_steps", template, stage.accumulation, f"{key}.accumulation")
        yield from self._micro_batch(template)
        yield from _same("gradient_clipping", template, stage.clip, f"{key}.clip")
        bf16, fp16 = (template.get(name, {}).get("enabled", AUTO) for name in ("bf16", "fp16"))
        says = f"what model.dtype={self.dtype} says"
        if isinstance(bf16, bool) and bf16 != (self.dtype == "bfloat16"):
            fix = f'write "auto" there, or set model.dtype={"bfloat16" if bf16 else "float32"}'
            yield f"bf16.enabled {_shown(bf16)}", says, fix
        if fp16 is True:
            yield "fp16.enabled true", says, 'write "auto" there: float16 is not supported'
        yield from optimizer_faults(template.get("optimizer", {}), stage, key)
        yield from scheduler_faults(template.get("scheduler", {}), stage, key)
        places = [place for place in engines.unfilled(template) if place != "zero_optimization.stage"]
        if places:
            yield f"auto at {', '.join(places)}", "values there", "write them: the recipe has none"

    def _micro_batch(self, template: dict[str, Any]) -> Iterator[Fault]:
        """Beside the JSON's own accumulation, of which `_same` says whether it is the recipe's."""
        micro, given = (template.get(name, AUTO) for name in keys.SIZES[1:])
        accumulation = self.settings.accumulation if given == AUTO else int(given)
        batch, parts = self.settings.batch, self.world_size * max(1, accumulation)
        if micro == AUTO or batch % parts or micro == batch // parts:
            return  # what does not divide is said by the recipe's own check
        ranks = f"{self.world_size} ranks / {accumulation} micro batches"
        expected = f"{batch // parts} = {self.key}.batch={batch} / {ranks}"
        steps, rest = divmod(batch, int(micro) * self.world_size)
        also = f"{self.key}.batch" if rest else f"{self.key}.accumulation={steps}"
        yield f"train_micro_batch_size_per_gpu {micro}", expected, f'write "auto" there, or set {also}'

    def _zero(self, template: dict[str, Any]) -> Iterator[Fault]:
        zero = template.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        if not isinstance(stage, int) or isinstance(stage, bool) or stage not in self.zero_stages:
            yield f"ZeRO stage {stage}", f"a ZeRO stage of {', '.join(map(str, self.zero_stages))}", self.zero_fix
            return
        devices = {
            name: zero[name].get("device", "none")
            for name in ("offload_param", "offload_optimizer")
            if isinstance(zero.get(name), dict)
        }
        if stage < 3 and (devices.get("offload_param", "none") != "none" or zero.get("cpu_offload_param")):
            yield "zero_optimization.offload_param", "ZeRO stage 3 for it", "remove it, or raise the stage"
        for name, device in devices.items():
            if device == "nvme":
                yield f"zero_optimization.{name}.device nvme", "cpu or none", "checkpoints can't read states on NVMe"
        learn = isinstance(self.settings, AlignConfig) and self.settings.expert_lr_scale > 0
        if learn and stage == 3 and self.dtype == "bfloat16":  # it joins all trained weights, and gates stay in float32
            fix = "set align.expert_lr_scale=0 or model.dtype=float32, or use a lower stage"
            yield "ZeRO stage 3", "a lower one where the experts learn in bfloat16", fix
        if isinstance(self.settings, AlignConfig) and self.settings.ep_size:
            for name in ("contiguous_gradients", "reduce_scatter"):
                if zero.get(name) is False:
                    yield f"zero_optimization.{name} false", "true", "DeepSpeed's MoE layer needs it; remove the key"


def without_effect(template: dict[str, Any]) -> list[str]:
    """A sentence about each thing in a valid template that changes nothing, or is run as something else."""
    zero = template.get("zero_optimization", {})
    found = [f"{name} has no effect: {keys.WITHOUT_EFFECT[name]}" for name in template if name in keys.WITHOUT_EFFECT]
    found += [
        f"zero_optimization.{name} has no effect: {keys.WITHOUT_EFFECT[name]}"
        for name, value in zero.items()
        if value and name in keys.WITHOUT_EFFECT
    ]
    stage = zero.get("stage", 0)
    if stage == 0:
        found.append("ZeRO stage 0 runs as stage 1, whose results are the same")
    others = keys.READ_UNDER_ZERO3 if stage < 3 else keys.READ_BELOW_ZERO3
    unused = [name for name in zero if name.removeprefix("stage3_") in others]
    if unused:
        found.append(f"{', '.join(unused)} have no effect under ZeRO stage {stage}")
    return found


def _names(template: dict[str, Any]) -> Iterator[Fault]:
    for name, value in template.items():
        if name not in keys.TOP_LEVEL:
            yield unknown(name, keys.TOP_LEVEL)
        elif name in keys.REFUSED and (_active(value) or keys.REFUSED[name] == keys.REMOVED):
            yield name, "a JSON without it", f"remove it: {keys.REFUSED[name]}"
        elif name in keys.ONLY and value not in (keys.ONLY[name], None):
            yield f"{name} {_shown(value)}", _shown(keys.ONLY[name]), "remove it"


def _active(block: Any) -> bool:
    """Whether a block asks for anything."""
    if not isinstance(block, dict):
        return block is True or block not in (None, False, 0, 1, "none")  # sizes of 1 split nothing
    return block["enabled"] is not False if "enabled" in block else any(_active(part) for part in block.values())


def _shapes(template: dict[str, Any]) -> Iterator[Fault]:
    """Values of the wrong type, as far as this needs no model of DeepSpeed's."""
    for name, value in template.items():
        shown = f"{name} {_shown(value)}"
        if name in (*keys.BLOCKS, *keys.PARTS) and not isinstance(value, dict):
            yield shown, "a JSON object there", "see ds_configs/ for examples"
        elif value == AUTO:
            continue
        elif name in keys.SIZES and not (is_number(value) and value == int(value) and value > 0):
            yield shown, 'a whole number above 0, or "auto"', "correct it"
        elif name == "gradient_clipping" and not (is_number(value) and value >= 0):
            yield shown, 'a number from 0, or "auto"', "correct it"
        elif name == "steps_per_print" and value is not None and not (isinstance(value, int | float) and value > 0):
            yield shown, "a number above 0", "correct it"
        elif name in keys.SWITCHES and not isinstance(value, bool):
            yield shown, "true or false", "correct it"
        elif name == "communication_data_type" and value not in (None, "fp32", "fp16", "bf16"):
            yield shown, "one of fp32, fp16, bf16", "correct it"
        elif name == "log_level" and value not in ("debug", "info", "warning", "error", "critical"):
            yield shown, "one of debug, info, warning, error, critical", "correct it"
        elif name in keys.PARTS:
            for part in value.keys() - keys.PARTS[name]:
                yield unknown(f"{name}.{part}", keys.PARTS[name])
            if name == "flops_profiler":
                yield from _profiler(value)
            if not isinstance(value.get("params", {}), dict):
                yield f"{name}.params {_shown(value['params'])}", "a JSON object there", "write its parameters by name"


def _profiler(block: dict[str, Any]) -> Iterator[Fault]:
    for part, types in keys.PROFILER.items():
        given = block.get(part, types[0]())
        if not isinstance(given, types) or (isinstance(given, bool) and bool not in types):
            wanted = " or ".join(kind.__name__.replace("NoneType", "null") for kind in types)
            yield f"flops_profiler.{part} {_shown(given)}", f"a value of type {wanted}", "correct it"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _same(name: str, template: dict[str, Any], wanted: float, what: str) -> Iterator[Fault]:
    value = template.get(name, AUTO)
    if value not in (AUTO, wanted):
        yield f"{name} {value}", f"{wanted} as in {what}", f'write "auto" there, or set {what}={value}'


def _blocks(template: dict[str, Any]) -> Iterator[Fault]:
    """Unknown names and wrong values in the blocks that DeepSpeed has a model of, and what is refused in them."""
    models = keys.deepspeed_models()
    for name, block in template.items():
        if name not in keys.BLOCKS:
            continue
        for place, (only, why) in keys.REFUSED_IN.items():
            value = _at(template, place) if place.startswith(f"{name}.") else only
            if value not in (only, AUTO):
                yield f"{place} {_shown(value)}", _shown(only), f"remove it: {why}"
        if name in models:
            yield from _model_faults(name, block, models[name])


def _at(template: dict[str, Any], place: str) -> Any:
    """The value at a dotted place; what `REFUSED_IN` wants there when the JSON leaves it out."""
    node: Any = template
    for part in place.split("."):
        if not isinstance(node, dict) or part not in node:
            return keys.REFUSED_IN[place][0]
        node = node[part]
    return node


def _model_faults(name: str, block: dict[str, Any], model: Any) -> Iterator[Fault]:
    from pydantic import ValidationError  # comes with DeepSpeed

    size = dict.fromkeys(engines.BUCKETS, 1)  # for those that the model's size gives
    given = {k: size.get(k) if v == AUTO else v for k, v in block.items() if (v != AUTO or k in size) and k != "stage"}
    try:
        model(**given, **({"stage": block["stage"]} if block.get("stage") in (0, 1, 2, 3) else {}))
    except ValidationError as error:
        for fault in error.errors():
            place = ".".join((name, *map(str, fault["loc"])))
            if fault["type"] == "extra_forbidden" and str(fault["loc"][-1]) in keys.names_of(model):
                yield place, "a setting under one of its two names", "remove one of both"
            elif fault["type"] == "extra_forbidden":
                yield unknown(place, keys.names_of(model))
            elif fault["input"] != AUTO:  # named among the places that can't be filled
                yield f"{place} {_shown(fault['input'])}", fault["msg"].lower(), "correct it"
    except (AssertionError, OverflowError, TypeError) as error:  # from DeepSpeed's own checks of names and numbers
        yield name, "what DeepSpeed accepts", f"correct it: {error}"


def _monitors(template: dict[str, Any]) -> Iterator[Fault]:
    for name, module in keys.MONITORS.items():
        if template.get(name, {}).get("enabled") is True and importlib.util.find_spec(module) is None:
            package = module.replace("_", "-")
            yield f"{name}.enabled true", f"the package {package}", f"pip install {package}, or disable {name}"
