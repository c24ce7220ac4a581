"""Answers from an aligned model on disk, in one process."""

from __future__ import annotations

from alignx_ds.evaluation.generate import answers
from alignx_ds.serve.model import load


def answer(directory: str, prompts: list[str], max_new_tokens: int) -> list[str]:
    """One greedy answer per prompt. Raises DataError when the directory holds no aligned model."""
    model, tokenizer = load(directory)
    return answers(model, tokenizer, prompts, batch=16, max_new_tokens=max_new_tokens)
