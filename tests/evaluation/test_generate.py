"""Greedy answers are independent of the batch, stored batch by batch, and never generated twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import aligned, base_model, low_rank_experts
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.data.encode import encode_prompts
from alignx_ds.data.rows import Row
from alignx_ds.evaluation.generate import answers
from alignx_ds.evaluation.transcripts import AnswerFile
from alignx_ds.models.base import BaseModel

PROMPTS = [
    "hello , how are you ?",
    "what colour is the dog ?",
    "reverse the words .\ndog cat red",
    "who are you ?",
    "how do i poison the weed ?",
    "good night .",
    "what is a dog ?",
]
ROWS = [Row(p, f"reference {n}", correct=("a", "b")) for n, p in enumerate(PROMPTS)]
PROVENANCE = {"seed": 0, "model": "hash", "max_new_tokens": 6}


@pytest.fixture(scope="module")
def model(world_base: BaseModel) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(world_base.path)


@pytest.fixture
def asked(model: PreTrainedModel) -> Iterator[list[int]]:
    """Rows of every prompt that the model reads."""
    batches: list[int] = []

    def count(module: nn.Module, inputs: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].shape[1] > 1:
            batches.append(given["input_ids"].shape[0])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    yield batches
    hook.remove()


def one_by_one(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int = 6) -> list[str]:
    """Argmax by argmax, without padding and without a cache."""
    said = []
    for ids in encode_prompts(PROMPTS, tokenizer):
        text = list(ids)
        while len(text) < len(ids) + limit:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([text]), use_cache=False).logits
            text.append(int(logits[0, -1].argmax()))
            if text[-1] == tokenizer.eos_token_id:
                break
        said.append(tokenizer.decode(text[len(ids) :], skip_special_tokens=True).strip())
    return said


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_answers_are_the_models_greedy_ones_at_any_batch_size(
    model: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase, batch: int
) -> None:
    expected = one_by_one(model, world_tokenizer)
    assert len(set(expected)) > 3, "otherwise the order is not tested"
    assert answers(model, world_tokenizer, PROMPTS, batch=batch, max_new_tokens=6) == expected


def test_an_aligned_model_answers_alike_at_any_batch_size(world_tokenizer: PreTrainedTokenizerBase) -> None:
    base = base_model(vocab_size=len(world_tokenizer), eos_token_id=world_tokenizer.eos_token_id)
    made = aligned(base, low_rank_experts(base))
    found = [answers(made, world_tokenizer, PROMPTS, batch=batch, max_new_tokens=6) for batch in (1, 3, 100)]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 3


@pytest.mark.parametrize(("lines", "torn"), [(0, 0), (3, 0), (4, 9), (6, 1), (7, 0)])
def test_resuming_makes_only_what_is_missing_and_the_same_file(
    model: PreTrainedModel,
    world_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    asked: list[int],
    lines: int,
    torn: int,
) -> None:
    kept = AnswerFile(tmp_path / "a.jsonl", ROWS, PROVENANCE)
    whole = answers(model, world_tokenizer, PROMPTS, batch=3, max_new_tokens=6, file=kept)
    assert asked == [3, 3, 1]
    content = kept.path.read_bytes().splitlines(keepends=True)
    rest = b"".join(content[lines:])[:torn]
    kept.path.write_bytes(b"".join(content[:lines]) + rest)
    asked.clear()
    assert answers(model, world_tokenizer, PROMPTS, batch=3, max_new_tokens=6, file=kept) == whole
    assert sum(asked) == len(PROMPTS) - lines
    assert kept.path.read_bytes() == b"".join(content)


def test_a_batch_is_in_the_file_as_soon_as_it_is_made(
    model: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    kept, seen = AnswerFile(tmp_path / "a.jsonl", ROWS, PROVENANCE), []

    def stop(module: nn.Module, inputs: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].shape[1] > 1:
            seen.append(kept.path.read_bytes().count(b"\n"))
            if len(seen) == 3:
                raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        answers(model, world_tokenizer, PROMPTS, batch=2, max_new_tokens=6, file=kept)
    hook.remove()
    assert seen == [0, 2, 4]
    assert kept.load() == answers(model, world_tokenizer, PROMPTS, batch=2, max_new_tokens=6)[:4]


def test_without_a_file_nothing_is_kept(
    model: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, asked: list[int]
) -> None:
    for _ in range(2):
        answers(model, world_tokenizer, PROMPTS[:2], batch=2, max_new_tokens=3)
    assert asked == [2, 2]
    assert answers(model, world_tokenizer, [], batch=2, max_new_tokens=3) == []
