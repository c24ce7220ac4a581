"""Judge one system on every axis's held-out rows; its answers are kept as JSON lines."""

from __future__ import annotations

import json
from dataclasses import dataclass

from transformers import PreTrainedModel

from alignx_ds import distributed, manifest
from alignx_ds.config import RunConfig
from alignx_ds.console import Progress
from alignx_ds.data.rows import Row
from alignx_ds.evaluation.generate import answers
from alignx_ds.evaluation.judges import JUDGES, Figures
from alignx_ds.inputs import Inputs
from alignx_ds.outputs import Outputs
from alignx_ds.specialists.base import BaseModel


@dataclass(frozen=True)
class Judged:
    """By axis: the judge's figures, and a few answers to look at."""

    figures: dict[str, Figures]
    samples: dict[str, list[tuple[Row, str]]]


def judge(
    name: str,
    model: PreTrainedModel,
    config: RunConfig,
    base: BaseModel,
    data: Inputs,
    out: Outputs,
    progress: Progress,
) -> Judged:
    """Collective: every rank answers its share and judges the whole."""
    figures, samples = {}, {}
    for axis, rows in data.held_out.items():
        made = answers(
            model,
            base.tokenizer,
            [row.prompt for row in rows],
            batch=config.evaluation.batch,
            max_new_tokens=config.evaluation.max_new_tokens,
            progress=progress,
        )
        figures[axis] = JUDGES[config.axes[axis].judge](rows, made)
        samples[axis] = list(zip(rows, made, strict=True))[:3]
        if distributed.is_main():
            lines = (
                json.dumps({"prompt": r.prompt, "output": a, "reference": r.response})
                for r, a in zip(rows, made, strict=True)
            )
            manifest.write_text(out.answers / f"{name}.{axis}.jsonl", "\n".join(lines) + "\n")
    return Judged(figures, samples)
