"""`alignx-ds export adapters RUN_DIR OUT`: each specialist's expert as a LoRA adapter of the untouched base model.

The factors are those of the aligned model, after stage 2; lora_alpha = r, so an adapter's change is B·A as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from alignx_ds.data.encode import pad_token
from alignx_ds.experts.adapters import CONFIG, HALVES, PREFIX, WEIGHTS
from alignx_ds.export import cards
from alignx_ds.export.fidelity import Fidelity, compare, plain, routed, without_calibration, written
from alignx_ds.export.merged import backbone_with, changes_of, factors_of
from alignx_ds.export.prompts import prompts_of
from alignx_ds.export.runs import FinishedRun, new_directory
from alignx_ds.mocae.backbones import Backbone, backbone_of
from alignx_ds.mocae.experts import PROJECTIONS, Factors
from alignx_ds.runs import manifest
from alignx_ds.runtime import console

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be
WITHOUT, WITH = "without output calibration", "with output calibration"


def export(root: Path, out: Path, prompts: Path | None, count: int, limit: int) -> None:
    """Write a directory per axis, and say how far each adapter is from its expert. Raises ConfigError or DataError."""
    run = FinishedRun.at(root)
    asked = prompts_of(run, prompts, count)
    with new_directory(out) as directory:
        for axis in run.axes:
            factors = factors_of(run.model, run.expert(axis))
            found = dict(_differences(run, axis, factors, asked, limit))
            _write(directory / axis, run, axis, factors, found)
            told = "; ".join(f"{name}: {f.told()}" for name, f in found.items()) or cards.NOT_MEASURED
            console.say(f"{axis}: {out / axis}\n  against the forced expert, {told}")


def _differences(
    run: FinishedRun, axis: str, factors: dict[int, Factors], asked: dict[str, list[str]], limit: int
) -> Iterator[tuple[str, Fidelity]]:
    """The adapter on the base model against the forced expert, on all the prompts that there are."""
    every = [prompt for prompts in asked.values() for prompt in prompts]
    if not every:
        return
    texts, pad_id = written(run.model, run.tokenizer, every, limit), pad_token(run.tokenizer)
    adapted = plain(backbone_with(run.model, changes_of([(1.0, factors)])))
    forced = routed(run.model, run.expert(axis))
    with without_calibration(run.model):
        yield WITHOUT, compare(adapted, forced, texts, pad_id)
    yield WITH, compare(adapted, forced, texts, pad_id)


def _write(
    directory: Path, run: FinishedRun, axis: str, factors: dict[int, Factors], found: dict[str, Fidelity]
) -> None:
    directory.mkdir()
    table = backbone_of(run.model.config.text_config.model_type)
    save_file(tensors_of(factors, table), directory / WEIGHTS, metadata={"format": "pt"})
    settings = config_of(factors, table, run.base_path)
    manifest.write_text(directory / CONFIG, json.dumps(settings, indent=2) + "\n")
    manifest.write_text(directory / "README.md", _card(run, axis, int(settings["r"]), found))


def tensors_of(factors: dict[int, Factors], table: Backbone) -> dict[str, Tensor]:
    """By PEFT's names: lora_A [r, n], lora_B [m, r]."""
    named = {}
    for layer, f in factors.items():
        for p in PROJECTIONS:
            module = PREFIX + table.weight_name(layer, p).removesuffix(".weight")
            for half, tensor in zip(HALVES, (f.down[p], f.up[p]), strict=True):
                named[f"{module}.{half}"] = tensor.cpu().contiguous()
    return named


def config_of(factors: dict[int, Factors], table: Backbone, base: str) -> dict[str, Any]:
    """What PEFT and vLLM read; modules of a smaller rank are listed, each with alpha = r, so that nothing is scaled."""
    ranks = {
        table.weight_name(layer, p).removesuffix(".weight"): f.rank(p)
        for layer, f in factors.items()
        for p in PROJECTIONS
    }
    rank = max(ranks.values())
    smaller = {module: r for module, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": [getattr(table, p) for p in PROJECTIONS],
        "layers_to_transform": sorted(factors),
        "layers_pattern": table.layers.rpartition(".")[2],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _card(run: FinishedRun, axis: str, rank: int, found: dict[str, Fidelity]) -> str:
    served = next((r for r in VLLM_RANKS if r >= rank), None)
    vllm = f"`--max-lora-rank {served}`" if served else f"no vLLM: rank {rank} is above its limit of {VLLM_RANKS[-1]}"
    return f"""\
{cards.front_matter(run, ["lora", axis], library_name="peft")}
# The {axis} expert as a LoRA adapter

One expert of an aligned model (AlignX on DeepSpeed), of rank {rank}, for the untouched base model:
{cards.base_named(run)}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{run.hub_id or "PATH-OF-THE-BASE-MODEL"}", dtype="auto")
model = PeftModel.from_pretrained(base, "{axis}")
```

vLLM serves it beside the base model: `vllm serve BASE --enable-lora --lora-modules {axis}=DIRECTORY`, {vllm}.

## What it leaves out

The gate that sends prompts to experts, so that every prompt gets this one; and the calibration of the experts' output,
ỹ = y + R·(C(Qy) − Qy), which is no change of a weight. How far it is from the aligned model with this expert forced:

{cards.compared(found, "against the forced expert")}
"""
