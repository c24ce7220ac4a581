"""Train a small base model from scratch on plain text of the recipe's sources.

For machines without hub access: the whole of AlignX runs on real rows, on a model that has seen nothing else.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from alignx_ds.config.parse import substance
from alignx_ds.config.schema import RunConfig
from alignx_ds.data.encode import Example, LabelledExamples, encode, pad_token
from alignx_ds.data.rows import Row, digest
from alignx_ds.models.base import BaseModel
from alignx_ds.runs import manifest
from alignx_ds.runtime import console, distributed
from alignx_ds.stages.context import StageContext
from alignx_ds.training import engine as engines
from alignx_ds.training.keeper import Keeper
from alignx_ds.training.loop import micro_batches, train
from alignx_ds.training.losses import language_loss


def ensure(context: StageContext, texts: list[Row]) -> None:
    """Train the base model unless a current one is there. Collective."""
    config, base = context.config, context.base
    inputs = {
        "texts": digest(texts),
        "architecture": {k: v for k, v in asdict(config.scratch).items() if k not in ("texts", "train")},
        "train": substance(config.scratch.train),
        "max_length": config.model.max_length,
        "dtype": config.model.dtype,
        "seed": config.seed,
        "deepspeed": engines.settings_of(config.scratch.train.deepspeed, "scratch.train.deepspeed"),
    }
    keeper = context.keeper("base", inputs)
    if distributed.on_main(lambda: manifest.is_current(base.path, inputs)):
        console.say(f"base: unchanged, reused from {base.path}")
    else:
        model, losses = _train(config, base, texts, keeper)

        def save() -> None:
            model.save_pretrained(base.path)
            base.tokenizer.save_pretrained(base.path)
            manifest.write(base.path, inputs, {"losses": losses, "texts": len(texts)})

        distributed.on_main(save)
    keeper.finish()


def _train(config: RunConfig, base: BaseModel, texts: list[Row], keeper: Keeper) -> tuple[Any, list[float | None]]:
    settings = config.scratch.train
    limit = config.model.max_length
    encoded = encode(texts, base.tokenizer)
    examples = [Example(e.ids[:limit], 1, e.place) for e in encoded]  # the first token has no predecessor
    plan = engines.Plan.of(settings, config.model.dtype, engines.steps_of(settings, len(examples)))
    template = engines.read_template(settings.deepspeed, "scratch.train.deepspeed")
    filled = engines.fill(template, plan, distributed.world_size())
    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_config(base.config, dtype=base.dtype)
    groups = engines.decay_groups(list(model.named_parameters()), plan.weight_decay)
    engine = engines.start(model, groups, filled, plan)
    rows = LabelledExamples(examples, [0] * len(examples))
    batches = partial(micro_batches, rows, plan, pad_token(base.tokenizer), config.seed, packed=True)
    with console.progress("train the base model", plan.steps) as bar:
        losses = train(engine, batches, language_loss, plan, bar, keeper)
    trained = engine.module
    engine.destroy()
    return trained, losses
