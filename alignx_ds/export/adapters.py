"""`alignx-ds export adapters RUN_DIR OUT`: each specialist's expert as a LoRA adapter of the untouched base model.

The factors are those of the aligned model, after stage 2; lora_alpha = r, so an adapter's change is B·A as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from alignx_ds.data.encode import Example, pad_token
from alignx_ds.experts.adapters import CONFIG, HALVES, PREFIX, WEIGHTS
from alignx_ds.export import cards
from alignx_ds.export.fidelity import Fidelity, answered, compare, mixing_weights, plain, routed, without_calibration
from alignx_ds.export.measured import measured
from alignx_ds.export.merged import backbone_with, changes_of, factors_of, sum_of
from alignx_ds.export.prompts import prompts_of
from alignx_ds.export.weights import Weights, described, parse_weights
from alignx_ds.mocae.attention import padded
from alignx_ds.mocae.backbones import FUSED, Backbone, backbone_of
from alignx_ds.mocae.experts import Factors
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.ends import ends_of
from alignx_ds.models.finished import aligned_of, tokenizer_of
from alignx_ds.runs import manifest
from alignx_ds.runs.finished import FinishedRun
from alignx_ds.runs.new_directory import new_directory
from alignx_ds.runtime import console

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM accepts for --max-lora-rank
WITHOUT, WITH = "without output calibration", "with output calibration"
LOAD = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, {place})
```"""
OUTPUTS = "with mixed outputs"  # of several experts, in a model without output calibration


def export(
    root: Path,
    out: Path,
    chosen: str | None,
    prompts: Path | None,
    count: int,
    limit: int,
    published: cards.Publication,
) -> None:
    """Write a directory per axis with a card of them all, or one adapter of the axes in `chosen` (see weights.py).

    Prints how far each adapter is from the aligned model with the same gates forced, on answers of at most `limit`
    tokens to `count` prompts of each set, or of the file `prompts`. Raises ConfigError or DataError.
    """
    run = FinishedRun.open(root)
    made = {axis: {axis: 1.0} for axis in run.axes} if chosen is None else {"": parse_weights(chosen, run.axes)}
    model, tokenizer = aligned_of(run), tokenizer_of(run)
    every = [prompt for group in prompts_of(run, prompts, count).values() for prompt in group]
    examples, pad_id = answered(model, tokenizer, every, limit), pad_token(tokenizer)
    ends = ", ".join(f"`{tokenizer.convert_ids_to_tokens(i)}` ({i})" for i in ends_of(model, tokenizer))
    table = table_of_files(model)
    with new_directory(out) as directory:
        for name, weights in made.items():
            target = directory / name
            target.mkdir(exist_ok=True)
            factors = sum_of([(w, factors_of(model, run.experts.index(axis))) for axis, w in weights.items()])
            found = dict(_differences(model, weights, factors, examples, pad_id)) if examples else {}
            factors = with_neighbours(factors, table, model)
            settings = config_of(factors, table, cards.base_name(run, published))
            save_file(tensors_of(factors, table), target / WEIGHTS, metadata={"format": "pt"})
            manifest.write_text(target / CONFIG, json.dumps(settings, indent=2) + "\n")
            card = _card(run, published, name, weights, int(settings["r"]), found, ends)
            manifest.write_text(target / "README.md", card)
            differences = "; ".join(f"{what}: {f}" for what, f in found.items()) or cards.NOT_MEASURED
            console.say(f"{described(weights)}: {out / name}")
            console.say(f"  against the same gates, forced, {differences}")
        if chosen is None:
            manifest.write_text(directory / "README.md", _card_of_all(run, published))


def _differences(
    model: AlignXForCausalLM, weights: Weights, factors: dict[int, Factors], examples: list[Example], pad_id: int
) -> Iterator[tuple[str, Fidelity]]:
    """The base model with the adapter against the aligned model with these gates forced.

    Of several experts the aligned model mixes the weights (gate.combine) without output calibration, and what its own
    settings say with it. Where it has none, the second difference is left out if it would be the first one again.
    """
    settings = model.config.gate_settings()
    adapted = plain(backbone_with(model, changes_of([(1.0, factors)])))
    forced = routed(model, [weights.get(axis, 0.0) for axis in model.config.experts[1:]])
    with without_calibration(model), mixing_weights(model):
        yield WITHOUT, compare(adapted, forced, examples, pad_id)
    if settings.output_latent:
        yield WITH, compare(adapted, forced, examples, pad_id)
    elif len(weights) > 1 and settings.combine == "outputs":
        yield OUTPUTS, compare(adapted, forced, examples, pad_id)


def table_of_files(model: AlignXForCausalLM) -> Backbone:
    """The names in the base model's own files, which may have one weight for several projections (FUSED)."""
    return FUSED.get(model.config.fused) or backbone_of(model.config.text_config.model_type)


def with_neighbours(factors: dict[int, Factors], table: Backbone, model: AlignXForCausalLM) -> dict[int, Factors]:
    """With factors of rank 0 for what is not changed, but has its weight in one with a projection that is."""
    own, made = backbone_of(model.config.text_config.model_type), {}
    for layer, f in factors.items():
        down, up = dict(f.down), dict(f.up)
        for other in (other for p in f.down for other in table.sharing(getattr(table, p)) if other not in f.down):
            down[other], up[other] = padded(f, other, 0, own.linear(model.backbone, layer, other))
        made[layer] = Factors(down, up)
    return made


def _modules(layer: int, f: Factors, table: Backbone) -> dict[str, list[str]]:
    """By module: the projections whose weight it has, in the order of its rows."""
    return {table.weight_name(layer, p).removesuffix(".weight"): table.sharing(getattr(table, p)) for p in f.down}


def tensors_of(factors: dict[int, Factors], table: Backbone) -> dict[str, Tensor]:
    """By PEFT's names: lora_A [r, n], lora_B [m, r]; on the CPU.

    Where several projections have one weight, their ranks add up, and lora_B is block-diagonal: the same change.
    """
    named = {}
    for layer, f in factors.items():
        for module, projections in _modules(layer, f, table).items():
            a, b = torch.cat([f.down[p] for p in projections]), _block_diagonal([f.up[p] for p in projections])
            for half, tensor in zip(HALVES, (a, b), strict=True):
                named[f"{PREFIX}{module}.{half}"] = tensor.cpu().contiguous()
    return named


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    made: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return made


def config_of(factors: dict[int, Factors], table: Backbone, base: str) -> dict[str, Any]:
    """The adapter_config.json that PEFT and vLLM read. Every module has alpha = r, so that nothing is scaled."""
    ranks = {
        module: sum(map(f.rank, projections))
        for layer, f in factors.items()
        for module, projections in _modules(layer, f, table).items()
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
        "target_modules": list(dict.fromkeys(module.rpartition(".")[2] for module in ranks)),
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


def _card(
    run: FinishedRun,
    published: cards.Publication,
    folder: str,
    weights: Weights,
    rank: int,
    found: dict[str, Fidelity],
    ends: str,
) -> str:
    """Of one adapter, in a folder of the export or at its top."""
    several = len(weights) > 1
    experts, these = ("Experts", "these experts") if several else ("One expert", "this expert")
    left_out, mixed = f"The gate, which chooses experts for each prompt: here every prompt is answered by {these}.", ""
    if run.config.gate.output_latent:
        left_out += (
            "\nAnd the calibration of the experts' output, ỹ = y + R·(C(Qy) − Qy), which is no change of weights."
        )
        mixed = "Without output calibration their weights are mixed, with it as the run's gate.combine says."
    elif OUTPUTS in found:
        mixed = f"In the row *{WITHOUT}* their weights are mixed. The run's gate.combine mixes their outputs."
    served = next((r for r in VLLM_RANKS if r >= rank), None)
    limit = f"not in vLLM: rank {rank} is above its limit of {VLLM_RANKS[-1]}"
    vllm = f"`--max-lora-rank {served}`" if served else limit
    named = folder or Path(published.name).name
    return f"""\
{cards.front_matter(run, published, "peft", ["lora", *weights], "adapter")}
# {described(weights)} as a LoRA adapter

{experts} of an aligned model (AlignX on DeepSpeed), of rank {rank}, for the untouched base model:
{cards.base_named(run, published)}.

{LOAD.format(base=_base(run, published), place=_place(published, folder))}

vLLM serves it beside the base model: `vllm serve BASE --enable-lora --lora-modules {named}=DIRECTORY`, {vllm}.

An answer ends at {ends}. Where the base model's generation config does not name all of these tokens, pass them as
`stop_token_ids` (vLLM) or `eos_token_id` (transformers).

## What it leaves out

{left_out}
The difference from the aligned model with {these} forced:

{cards.comparison(found, f"against {these}, forced")}
{mixed if several and found else ""}
"""


def _base(run: FinishedRun, published: cards.Publication) -> str:
    return cards.hub_id(run, published) or "PATH-OF-THE-BASE-MODEL"


def _place(published: cards.Publication, folder: str) -> str:
    return f'"{published.name}"' + (f', subfolder="{folder}"' if folder else "")


def _card_of_all(run: FinishedRun, published: cards.Publication) -> str:
    folders = "\n".join(f"- [{axis}]({axis}/README.md)" for axis in run.axes)
    return f"""\
{cards.front_matter(run, published, "peft", ["lora", *run.axes], "adapter")}
# {published.name}

The experts of an aligned model (AlignX on DeepSpeed), each as a LoRA adapter in a folder of its own, for the untouched
base model: {cards.base_named(run, published)}.

{folders}

{LOAD.format(base=_base(run, published), place=_place(published, run.axes[0]))}

{cards.MEASURED}

{measured(run)}
"""
