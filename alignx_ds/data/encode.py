"""Rows to token ids: the prompt as the tokenizer's chat template writes it, and the loss mask on the answer only."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignx_ds.data.rows import Row

IGNORED = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and answer, and where the answer starts."""

    ids: tuple[int, ...]
    prompt_length: int
    place: str = field(default="", compare=False)  # file and row, for error messages

    @property
    def answer_length(self) -> int:
        return len(self.ids) - self.prompt_length


@dataclass(frozen=True)
class Batch:
    """All [B, T] int64; labels are IGNORED outside the answer. `position_ids` of packed rows start anew at each row."""

    input_ids: Tensor
    attention_mask: Tensor
    prompt_mask: Tensor
    labels: Tensor
    position_ids: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: t if t is None else t.to(device) for name, t in tensors.items()}
        return Batch(**moved)


def encode_prompts(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase, system: str | None = None
) -> list[list[int]]:
    """The ids up to where each answer begins; `system` is the axis's injected prompt."""
    texts, templated = prompt_texts(prompts, tokenizer, system), tokenizer.chat_template is not None
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=not templated)["input_ids"]]


def prompt_texts(prompts: list[str], tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> list[str]:
    """The text up to where each answer begins; a chat template writes its special tokens itself."""
    if tokenizer.chat_template is None:
        intro = system or "Below is an instruction that describes a task. Write a response that completes the request."
        return [f"{intro}\n\n### Instruction:\n{prompt}\n\n### Response:\n" for prompt in prompts]
    head = [{"role": "system", "content": system}] if system else []
    chats = [[*head, {"role": "user", "content": prompt}] for prompt in prompts]
    texts: list[str] = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return texts


def encode(rows: list[Row], tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> list[Example]:
    """Prompts and answers, closed by the end-of-sequence token; a row without a response ends with its prompt."""
    if not rows:
        return []
    assert tokenizer.eos_token_id is not None
    prompts = encode_prompts([row.prompt for row in rows], tokenizer, system)
    answers = tokenizer([row.response for row in rows], add_special_tokens=False)["input_ids"]
    examples = []
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        closed = (*answer, int(tokenizer.eos_token_id)) if row.response else ()
        examples.append(Example((*prompt, *closed), len(prompt), row.place))
    return examples


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id; the end-of-sequence id where the tokenizer has none (masks keep the two apart)."""
    chosen = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert chosen is not None
    return int(chosen)


def collate(examples: list[Example], pad_id: int, side: str = "right") -> Batch:
    """Pad to the longest example, on either side."""
    assert examples and side in ("left", "right")
    width = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), width), pad_id)
    attention, prompt = torch.zeros_like(ids), torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, example in enumerate(examples):
        start = width - len(example.ids) if side == "left" else 0
        middle, end = start + example.prompt_length, start + len(example.ids)
        ids[i, start:end] = torch.tensor(example.ids)
        attention[i, start:end] = 1
        prompt[i, start:middle] = 1
        labels[i, middle:end] = ids[i, middle:end]
    return Batch(ids, attention, prompt, labels)


def pack(examples: list[Example], pad_id: int) -> Batch:
    """The same rows in fewer lines, as wide as the longest of them; no row attends to another.

    First-fit decreasing. Position ids start anew at each row, and at the padding: without an attention mask the model
    takes every such start for the start of another text.
    """
    assert all(e.prompt_length for e in examples), "a row's first token can't be predicted, so it has no label"
    width = max(len(e.ids) for e in examples)
    lines: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        place = next((i for i, free in enumerate(room) if free >= len(example.ids)), len(lines))
        if place == len(lines):
            lines.append([])
            room.append(width)
        lines[place].append(example)
        room[place] -= len(example.ids)
    ids = torch.full((len(lines), width), pad_id)
    attention, prompt, positions = torch.zeros_like(ids), torch.zeros_like(ids), torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, line in enumerate(lines):
        start = 0
        for example in line:
            middle, end = start + example.prompt_length, start + len(example.ids)
            ids[i, start:end] = torch.tensor(example.ids)
            attention[i, start:end] = 1
            prompt[i, start:middle] = 1
            positions[i, start:end] = torch.arange(len(example.ids))
            labels[i, middle:end] = ids[i, middle:end]
            start = end
        positions[i, start:] = torch.arange(width - start)
    return Batch(ids, attention, prompt, labels, positions)
