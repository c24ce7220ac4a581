"""Answers from an aligned model on disk, in one process."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig
from transformers.utils import logging

from alignx_ds.errors import DataError
from alignx_ds.evaluation.generate import answers
from alignx_ds.models import pretrained
from alignx_ds.models.backbone import load_aligned
from alignx_ds.models.pretrained import NO_CODE
from alignx_ds.models.tokenizer import load_tokenizer
from alignx_ds.runtime import distributed


def answer(directory: str, prompts: list[str], max_new_tokens: int) -> list[str]:
    """One greedy answer per prompt. Raises DataError when the directory holds no aligned model."""
    pretrained.check(Path(directory), "model", directory)
    config = Path(directory) / "config.json"
    if not config.is_file() or AutoConfig.from_pretrained(directory, **NO_CODE).model_type != "alignx":
        raise DataError(f"{directory}: no aligned model there; give the model directory of a finished run")
    logging.disable_progress_bar()
    model = load_aligned(Path(directory)).to(distributed.device())
    tokenizer = load_tokenizer(Path(directory), "model", directory)
    return answers(model, tokenizer, prompts, batch=16, max_new_tokens=max_new_tokens)
