"""LoRA adapters in PEFT's file format: one that changes projections of FFN and attention can be an axis's expert.

The two files are read without peft, which need not be installed. Shapes: a projection W [m, n] becomes W + s·B·A with
lora_A [r, n], lora_B [m, r] and s = alpha / r; an expert's `up` factor is s·B.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from math import sqrt
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.experts.declared import ALPHA, contradictions, other_base, pattern_value
from alignx_ds.mocae.experts import ATTENTION, PROJECTIONS, Factors
from alignx_ds.models.architecture import FLOATS
from alignx_ds.models.base import BaseModel, local_model
from alignx_ds.models.pretrained import reading
from alignx_ds.models.stored import not_finite, read_headers
from alignx_ds.runs.manifest import file_hash

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before every module's name in PEFT's files
HALVES = ("lora_A.weight", "lora_B.weight")
WANTED = f"a LoRA adapter: a directory with {CONFIG} and {WEIGHTS}, or its hub id"
FAITHFUL = "an adapter that is W + s·B·A and no more"
# Settings under which an adapter is more than that, or changes the base model while it is loaded.
BEYOND = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config", "velora_config"),
    *("monteclora_config", "kasa_config", "megatron_config"),
)
CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Adapter:
    """An adapter's directory, on disk or from the hub. `key` is the recipe's key, for messages."""

    def __init__(self, path: str, key: str) -> None:
        """Raises ConfigError or UnreachableError."""
        self.given, self.key = path, key
        self.path = local_model(path, key, allowed=WANTED, files=(CONFIG, WEIGHTS))
        absent = [name for name in (CONFIG, WEIGHTS) if not (self.path / name).is_file()]
        if absent:
            fix = f"it has no {' and no '.join(absent)}; weights in another format are not read"
            raise ConfigError(Problem(key, path, WANTED, fix))
        self.tensors = read_headers([self.path / WEIGHTS], key, path)
        self.shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The settings in the adapter's config file. Raises ConfigError if it can't be read or is not of a LoRA."""
        try:
            content = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(Problem(self.key, self.given, WANTED, f"{CONFIG} can't be read ({error})")) from error
        kind = content.get("peft_type") if isinstance(content, dict) else None
        if kind != "LORA":
            fix = f"{CONFIG} is not of PEFT's type LORA" + (f" but of {kind!r}" if kind else "")
            raise ConfigError(Problem(self.key, self.given, WANTED, f"{fix}, which an expert can't represent"))
        settings: dict[str, Any] = content
        return settings

    @property
    def digest(self) -> dict[str, str]:
        """Hashes of its two files, by name."""
        return {name: file_hash(self.path / name) for name in (CONFIG, WEIGHTS)}

    def problems(self, base: BaseModel) -> Iterator[Problem]:
        """Every reason why it can't be an expert of this base exactly as it is. Raises ConfigError."""
        with reading(self.key, self.given, CONFIG, WANTED):
            found = [*self._settings(), *self._module_problems(base)]
            yield from found or [*self._declared(base), *self._value_problems()]

    def _module_problems(self, base: BaseModel) -> Iterator[Problem]:
        modules, unknown = _modules(base), sorted({_module(name) for name in self.shapes} - set(_modules(base)))
        if unknown:
            named = ", ".join(dict.fromkeys(".".join(name.split(".")[-2:]) for name in unknown))
            fix = f"it changes {named}, which no expert hosts; train one on those projections only"
            yield Problem(self.key, self.given, f"an adapter of these projections: {_names(base)}", fix)
        known = {name: modules[name] for name in map(_module, self.shapes) if name in modules}
        outside = sorted({layer for layer, _ in known.values()} - set(base.layers))
        if outside:
            every = sorted({layer for layer, _ in known.values()} | set(base.layers))
            fix = f"it changes the layers {outside} as well; set model.layers={every}"
            yield Problem(self.key, self.given, f"an adapter of the AlignX layers {base.layers}", fix)
        for module, (layer, projection) in known.items():
            yield from self._shape_problem(module, layer, projection, base)

    def _settings(self) -> Iterator[Problem]:
        for name in BEYOND:
            if self.config.get(name):
                yield Problem(
                    self.key, self.given, FAITHFUL, f"it was made with {name}, which an expert can't represent"
                )
        if self.config.get("bias", "none") != "none":
            yield Problem(self.key, self.given, FAITHFUL, "it changes biases, which the experts share")
        start = str(self.config.get("init_lora_weights"))
        if start.startswith(CHANGING_THE_BASE):
            fix = f"init_lora_weights={start} changes the base model itself; convert it to plain LoRA with peft"
            yield Problem(self.key, self.given, FAITHFUL, fix)

    def _declared(self, base: BaseModel) -> Iterator[Problem]:
        """What its config says of it."""
        ranks = {_module(name): shape[0] for name, shape in self.shapes.items() if name.endswith(HALVES[0])}
        for fix in contradictions(self.config, ranks, base):
            yield Problem(self.key, self.given, f"a whole adapter, as its {CONFIG} describes it", fix)
        if other := other_base(self.config, base):
            fix = f"its {CONFIG} names {other!r}; set model.path to that, or correct the name there if it is this model"
            yield Problem(self.key, self.given, f"an adapter of the base model, {base.settings.path}", fix)

    def _value_problems(self) -> Iterator[Problem]:
        """A change that is not finite, or none at all."""
        kinds = {t.dtype: name for name, t in self.tensors.items() if t.dtype not in FLOATS}
        if kinds:
            fix = (
                f"its {next(iter(kinds.values()))} is of type {next(iter(kinds))}: it is quantised; save it in float32"
            )
            yield Problem(self.key, self.given, "an adapter whose factors are plain floats", fix)
        elif damaged := not_finite(self.tensors.values()):
            fix = f"its {damaged.name} holds NaN or infinite values: train it again"
            yield Problem(self.key, self.given, "an adapter whose factors are numbers", fix)
        elif not any(self._change(module).any() for module in dict.fromkeys(map(_module, self.shapes))):
            fix = "its factors multiply to zero, as before the first step of training: it changes nothing"
            yield Problem(self.key, self.given, "an adapter that changes the base model", fix)

    def _change(self, module: str) -> Tensor:
        a, b = (self.tensors[f"{PREFIX}{module}.{half}"].read() for half in HALVES)
        return self._scale(module, len(a)) * (b.float() @ a.float())

    def _shape_problem(self, module: str, layer: int, projection: str, base: BaseModel) -> Iterator[Problem]:
        linear = base.table.linear(base.skeleton, layer, projection)
        m, n = linear.out_features, linear.in_features
        (a, b), allowed = (self.shapes.get(f"{PREFIX}{module}.{half}") for half in HALVES), f"factors of [{m}, {n}]"
        if a is None or b is None or len(a) != 2 or len(b) != 2:
            yield Problem(self.key, self.given, allowed, f"{module} lacks one of {' and '.join(HALVES)}")
        elif (a[1], b[0], b[1]) != (n, m, a[0]):
            fix = f"those of {module} are {a} and {b}: it was trained on another base model"
            yield Problem(self.key, self.given, allowed, fix)

    def factors(self, base: BaseModel) -> dict[int, Factors]:
        """The expert's factors by AlignX layer, fp32; those of the FFN are zero where the adapter does not change it.

        To be called only when there are no `problems`.
        """
        tensors = load_file(self.path / WEIGHTS)
        found: dict[int, Factors] = {}
        for layer in base.layers:
            down, up = {}, {}
            for p in (*base.table.projections, *(ATTENTION if layer > min(base.layers) else ())):
                module = base.table.weight_name(layer, p).removesuffix(".weight")
                a, b = (tensors.get(f"{PREFIX}{module}.{half}") for half in HALVES)
                if a is not None and b is not None:
                    down[p], up[p] = a.float(), self._scale(module, len(a)) * b.float()
                elif p in PROJECTIONS:
                    linear = base.table.linear(base.skeleton, layer, p)
                    down[p], up[p] = torch.zeros(1, linear.in_features), torch.zeros(linear.out_features, 1)
            found[layer] = Factors(down, up)
        return found

    def changes_attention(self, base: BaseModel) -> bool:
        """Whether an expert of this base made of it would change projections of the attention."""
        return any(p in ATTENTION for layer, p in self._places(base) if layer > min(base.layers))

    def _places(self, base: BaseModel) -> list[tuple[int, str]]:
        """(layer, projection) of what it changes."""
        modules = _modules(base)
        return [modules[module] for module in dict.fromkeys(map(_module, self.shapes)) if module in modules]

    def lost(self, base: BaseModel) -> float:
        """The share of its squared norm that no expert holds: of the lowest AlignX layer's attention.

        The gate decides after it.
        """
        norms = {module: self._change(module).square().sum() for module in dict.fromkeys(map(_module, self.shapes))}
        modules, lowest = _modules(base), min(base.layers)
        lost = sum(norm for m, norm in norms.items() if modules[m][0] == lowest and modules[m][1] in ATTENTION)
        return float(lost / sum(norms.values()))

    def _scale(self, module: str, rank: int) -> float:
        """PEFT's s: alpha / r, or alpha / √r if rank-stabilised; a pattern may give a module its own alpha."""
        alpha = float(pattern_value(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", ALPHA)))
        return alpha / (sqrt(rank) if self.config.get("use_rslora") else rank)


def _modules(base: BaseModel) -> dict[str, tuple[int, str]]:
    """Every decoder layer's projections: module name -> (layer, projection)."""
    layers = range(base.config.num_hidden_layers)
    names = {(layer, p): base.table.weight_name(layer, p) for layer in layers for p in _hosted(base)}
    return {name.removesuffix(".weight"): place for place, name in names.items()}


def _module(tensor: str) -> str:
    """The name of the module that a tensor of the file belongs to; another tensor's name stays as it is."""
    half = next((half for half in HALVES if tensor.endswith(f".{half}")), None)
    return tensor.removeprefix(PREFIX).removesuffix(f".{half}") if half else tensor


def _names(base: BaseModel) -> str:
    return ", ".join(getattr(base.table, p) for p in _hosted(base))


def _hosted(base: BaseModel) -> tuple[str, ...]:
    """The projections that an expert of this base may change."""
    return (*base.table.projections, *ATTENTION)
