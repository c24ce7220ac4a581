"""LoRA fine-tunes: one after another; and with dropout, without noise on layers and with it, whole, and stopped after
two steps and given again.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from problems import fine_tune_context, stopped_after_two_steps

from alignx_ds.config.schema import CheckpointsConfig
from alignx_ds.errors import Stopped
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.runs import manifest
from alignx_ds.runtime import distributed
from alignx_ds.stages import finetune
from alignx_ds.stages.stage import StageContext


def lora(out: Path) -> dict[str, Any]:
    """The manifests of those with dropout; what all leave on disk is read by the tests."""
    plain, quiet, whole, broken = (_context(out, name, *settings) for name, settings in CONTEXTS.items())
    plain.config.checkpoints.finished = True
    finetune.fine_tune(plain, TUNE)
    finetune.fine_tune(plain, finetune.FineTune("then_b", ("b",), start="a"))
    # Neither trains the attention, which they start with as "a" has left it.
    plain.config.train.lora.targets = [f"{p}_proj" for p in PROJECTIONS]
    finetune.fine_tune(plain, finetune.FineTune("then_c", ("b",), start="a"))
    plain.config.train.trainable = "ffn"
    finetune.fine_tune(plain, finetune.FineTune("then_d", ("b",), start="a"))
    without, made = finetune.fine_tune(quiet, TUNE), finetune.fine_tune(whole, TUNE)
    with stopped_after_two_steps(), suppress(Stopped):
        finetune.fine_tune(broken, TUNE)
    resumed = finetune.fine_tune(broken, TUNE)
    return {name: manifest.read(d) for name, d in (("quiet", without), ("whole", made), ("resumed", resumed))}


CONTEXTS: dict[str, tuple[float, list[int]]] = {  # with their dropout, and the layers that get noise
    "lora": (0.0, []),
    "lora_quiet": (0.25, []),
    "lora_whole": (0.25, [0, 2]),
    "lora_stopped": (0.25, [0, 2]),
}
TRAINED = (*PROJECTIONS, "q", "o")  # those of the attention in the upper layer alone
TUNE = finetune.FineTune("a", ("a",), is_expert=True)


def _context(out: Path, name: str, dropout: float, noisy: list[int]) -> StageContext:
    context = fine_tune_context(out, f"{name}{distributed.world_size()}")
    context.config.axes["a"].noise_layers = noisy
    context.config.train.trainable, context.config.train.lora.dropout = "lora", dropout
    context.config.train.lora.targets = [f"{p}_proj" for p in TRAINED]
    context.config.checkpoints = CheckpointsConfig(every=3)
    return context
