"""Answers from an aligned model on disk, in one process."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import logging

from alignx_ds.errors import DataError
from alignx_ds.evaluation.generate import answers
from alignx_ds.models import pretrained
from alignx_ds.models.backbone import load_answering
from alignx_ds.models.registration import MODEL_TYPE
from alignx_ds.runtime import distributed


def answer(directory: str, prompts: list[str], max_new_tokens: int) -> list[str]:
    """One greedy answer per prompt. Raises DataError when the directory holds no aligned model."""
    pretrained.check(Path(directory), "model", directory)
    given = Path(directory)
    if not (given / "config.json").is_file() or pretrained.model_type(given, "model", directory) != MODEL_TYPE:
        raise DataError(f"{directory}: no aligned model there; give the model directory of a finished run")
    logging.disable_progress_bar()
    model, tokenizer = load_answering(given, "model", directory)
    model.to(distributed.device())
    return answers(model, tokenizer, prompts, batch=16, max_new_tokens=max_new_tokens)
