"""Train a small base model from scratch on plain text of the recipe's sources.

For machines without access to the hub: all of AlignX runs on real rows, on a model that has seen nothing else.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from alignx_ds.config.parse import substance
from alignx_ds.data.encode import Example, LabelledExamples, encode
from alignx_ds.data.rows import Row, digest
from alignx_ds.runtime import distributed
from alignx_ds.stages.stage import Stage, StageContext, ensure, set_up, trained
from alignx_ds.training import engine as engines
from alignx_ds.training import flops
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.losses import language_loss


def train_base(context: StageContext, texts: list[Row]) -> Path:
    """The base model's directory, made unless it is there. Collective."""
    return ensure(stage_of(context, texts), context, partial(_train, context, texts))


def stage_of(context: StageContext, texts: list[Row]) -> Stage:
    """The stage, with everything that its result depends on."""
    c, tokenizer = context.config, context.base.tokenizer
    written = f"{tokenizer.backend_tokenizer.to_str()} {tokenizer.chat_template}"
    inputs = {
        "texts": digest(texts),
        "tokenizer": hashlib.sha256(written.encode()).hexdigest(),
        "architecture": {k: v for k, v in asdict(c.scratch).items() if k not in ("texts", "train")},
        "train": substance(c.scratch.train),
        "max_length": c.model.max_length,
        "dtype": c.model.dtype,
        "seed": c.seed,
        "deepspeed": engines.settings_of(c.scratch.train.deepspeed, "scratch.train.deepspeed"),
    }
    return Stage("base", "base", context.base.path, inputs)


def _train(context: StageContext, texts: list[Row], job: TrainingJob) -> dict[str, Any]:
    config, base = context.config, context.base
    rows = _examples(context, texts)
    steps = engines.steps_of(config.scratch.train, len(rows.examples))
    setup = set_up(context, config.scratch.train, "scratch.train", steps, rows)
    torch.manual_seed(config.seed)
    model: nn.Module = AutoModelForCausalLM.from_config(base.config, dtype=base.dtype)
    groups = engines.decay_groups(list(model.named_parameters()), setup.plan.weight_decay)
    how: Any = {
        "title": "train the base model",
        "flops": flops.whole_model(base.config, rows.learned_share),
        "packed": True,
    }
    with trained(context, setup, model, groups, rows, language_loss, job, **how) as (module, losses):

        def save() -> None:
            module.save_pretrained(base.path)
            base.tokenizer.save_pretrained(base.path)

        distributed.on_main(save)
    return {"losses": losses, "texts": len(texts)}


def _examples(context: StageContext, texts: list[Row]) -> LabelledExamples:
    """All tokens are learned but the first, which has no predecessor; texts are cut at the greatest length."""
    limit = context.config.model.max_length
    examples = [Example(e.ids[:limit], 1, e.place) for e in encode(texts, context.base.tokenizer)]
    return LabelledExamples(examples, [0] * len(examples))
