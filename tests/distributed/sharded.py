"""What a run does with its models: with the whole trunk on every rank, and with a trunk spread over the ranks."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch
from problems import CALIBRATION_ROWS, EXAMPLES, EXPERTS, PAD, STAGE_ROWS, whole_stage_config
from safetensors.torch import load_file, save_file
from stage_contexts import stage_context
from tiny_models import VOCABULARY, base_model, low_rank_experts, padded, random_rows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignx_ds.baselines.merged import task_arithmetic
from alignx_ds.config.schema import ModelConfig
from alignx_ds.evaluation import compared
from alignx_ds.evaluation.generate import answers
from alignx_ds.evaluation.likelihood import likelihoods
from alignx_ds.models import sharding
from alignx_ds.models.backbone import load_backbone
from alignx_ds.models.base import BaseModel
from alignx_ds.models.ends import set_ends
from alignx_ds.runs.outputs import Outputs
from alignx_ds.runtime import distributed
from alignx_ds.stages import align, assembly
from alignx_ds.training.job import TrainingJob

PROMPTS = ["5 6 7", "8 9", "10 11 12 13"]  # of two ranks one has none in the last round
NEW_TOKENS = 20  # more than decode.CHECK_EVERY


def sharded(out: Path) -> dict[str, Any]:
    """By system; and the files that a sharded model leaves are loaded whole as well."""
    distributed.on_main(lambda: _write_bases(out / "sharded_bases"))
    share, found = sharding.SHARE, dict[str, Any]()
    for way in ("whole", "sharded"):
        sharding.SHARE = share if way == "whole" else 0.0
        found[way] = _systems(out, out / f"{way}_stage")
    sharding.SHARE = share
    base = BaseModel(ModelConfig(path=str(out / "sharded_bases" / "plain")))
    found["reloaded"] = _used(compared.load_aligned(base, out / "sharded_stage" / "model"), base)
    return found


def _systems(out: Path, directory: Path) -> dict[str, Any]:
    config, bases = whole_stage_config(out / "base", "ep0 zero3"), out / "sharded_bases"
    config.model.path, config.gate.kind = str(bases / "plain"), "needs"
    base = BaseModel(config.model)
    context = stage_context(config, Outputs(directory, directory), STAGE_ROWS, CALIBRATION_ROWS)
    specialists = [out / f"specialist{n}" for n in range(EXPERTS - 1)]
    loaded: list[weakref.ref[PreTrainedModel]] = []
    assembly.load_backbone = partial(_load_alone, loaded)
    gc.disable()  # what only a search frees stays until the stage searches
    aligned, losses = align.train_mixture(context, low_rank_experts(base_model()), TrainingJob("stage2"))
    gc.enable()
    assembly.load_backbone = load_backbone
    assert len(loaded) == 4, "for geometries, for routers, for training, and for what is saved"
    align.save(aligned, base, context.out.model)
    tied, fused = (BaseModel(ModelConfig(path=str(bases / name), dtype="bfloat16")) for name in ("tied", "fused"))
    return {
        "losses": losses,
        "trained": _used(aligned, base),
        "merged": _used(compared.load_merged(base, specialists, lambda v, _: task_arithmetic(v, 0.4)), base),
        "alignx": _used(compared.load_aligned(base, context.out.model), base),
        "tied, bfloat16": _used(compared.load_base(tied), tied),
        "fused, bfloat16": _used(compared.load_base(fused), fused),
    }


def _load_alone(loaded: list[weakref.ref[PreTrainedModel]], base: BaseModel) -> PreTrainedModel:
    assert not any(model() for model in loaded), "an earlier model is still in memory"
    model = load_backbone(base)
    loaded.append(weakref.ref(model))
    return model


def _write_bases(out: Path) -> None:
    """Three base models with a tokenizer that reads numbers; all other words are unknown to it."""
    made = {"plain": base_model(), "tied": base_model(tied=True, family="gemma"), "fused": base_model(family="phi3")}
    for name, model in made.items():
        model.save_pretrained(out / name)
        if name == "tied":  # as some store it: under the head's name alone
            weights = load_file(out / name / "model.safetensors")
            weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
            save_file(weights, out / name / "model.safetensors", metadata={"format": "pt"})
        words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="2"))
        words.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1").save_pretrained(out / name)


@torch.no_grad()
def _used(model: PreTrainedModel, base: BaseModel) -> dict[str, Any]:
    """The share of its weights that this rank holds, logits, answers, likelihoods, and its state."""
    weights = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    held = sum(w.numel() for w in weights) / sum(p.numel() for p in model.parameters())
    ids, mask = padded(random_rows([5, 9], 7))
    set_ends(model, base.tokenizer)
    return {
        "held": held,
        "logits": model(input_ids=ids, attention_mask=mask).logits,
        "answers": answers(model, base.tokenizer, PROMPTS, batch=1, max_new_tokens=NEW_TOKENS),
        "likelihoods": [found.log_probability for found in likelihoods(model, EXAMPLES[:7], PAD, batch=2)],
        "state": {name: sharding.whole(tensor).clone() for name, tensor in model.state_dict().items()},
    }
