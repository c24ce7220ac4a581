"""A sequence of two fine-tunes, and the same with what the second one has lost restored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from problems import EXAMPLES, fine_tune_context

from alignx_ds.data.encode import LabelledExamples
from alignx_ds.experts.task_vectors import read_task_vector
from alignx_ds.runs import manifest
from alignx_ds.runtime import distributed
from alignx_ds.stages import finetune, restore

HALF = len(EXAMPLES) // 2


def restoring(out: Path) -> dict[str, Any]:
    """The baseline's manifest, and the task vectors that it is made of."""
    context = fine_tune_context(out, f"restoring{distributed.world_size()}", lr=0.03)
    context.config.baselines.make = ["restored"]
    rows = LabelledExamples(EXAMPLES, [1] * HALF + [2] * (len(EXAMPLES) - HALF))
    injected = {"a": EXAMPLES[:HALF], "b": EXAMPLES[HALF:]}
    context = replace(context, data=replace(context.data, injected=injected, calibration_rows=rows))
    specialists = finetune.train_specialists(context)
    sequential = finetune.fine_tune(context, finetune.FineTune("then_b", ("b",), start="a"))
    made = restore.restored(context, sequential, specialists)["restored"]
    places = {**specialists, "sequential": sequential, "restored": made}
    return {
        "manifest": manifest.read(made),
        "vectors": {n: [read_task_vector(d, layer) for layer in context.base.layers] for n, d in places.items()},
    }
