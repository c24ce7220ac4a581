"""Rows to token ids: the prompt as the tokenizer's chat template writes it, then the answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from transformers import PreTrainedTokenizerBase

from alignx_ds.data.rows import Chat, Row, Turn
from alignx_ds.models.ends import answer_end
from alignx_ds.models.templates import render, template_of

Prompt = str | Chat  # a question, or a dialogue up to its last user turn


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its answer; the answer starts at index `prompt_length`."""

    ids: tuple[int, ...]
    prompt_length: int
    place: str = field(default="", compare=False)  # file and row, for error messages

    @property
    def answer_length(self) -> int:
        return len(self.ids) - self.prompt_length

    def prompt(self) -> Example:
        return Example(self.ids[: self.prompt_length], self.prompt_length)


def digest(examples: Sequence[Example]) -> str:
    """A hash of what was encoded, token ids and masks, in this order; not of where the rows come from."""
    compared = [f.name for f in fields(Example) if f.compare]
    found = hashlib.sha256()
    for example in examples:
        found.update(repr([getattr(example, name) for name in compared]).encode())
    return found.hexdigest()


@dataclass(frozen=True)
class LabelledExamples:
    """Examples, each with the number of the expert that it belongs to."""

    examples: list[Example]
    experts: list[int]

    @property
    def digest(self) -> str:
        """As of examples, with their experts."""
        return hashlib.sha256(f"{digest(self.examples)} {self.experts}".encode()).hexdigest()

    def add(self, examples: list[Example], expert: int) -> None:
        self.examples.extend(examples)
        self.experts.extend([expert] * len(examples))


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, system: str | None = None
) -> list[list[int]]:
    """Token ids up to where each answer begins; `system` is the axis's injected prompt."""
    texts, templated = prompt_texts(prompts, tokenizer, system), template_of(tokenizer) is not None
    encoded = tokenizer(texts, add_special_tokens=not templated)["input_ids"]
    return [list(ids) if templated else _open(ids, tokenizer) for ids in encoded]


def _open(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt without the special tokens that some tokenizers add after a text: its answer is still to come."""
    closing = set(tokenizer.all_special_ids)
    length = next((i for i in range(len(ids), 0, -1) if ids[i - 1] not in closing), 0)
    return list(ids[:length])


def prompt_texts(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> list[str]:
    """The text up to where each answer begins, special tokens included if the tokenizer has a chat template."""
    chats = [with_system(prompt, system) for prompt in prompts]
    if template_of(tokenizer) is None:
        return [_instruction_format(chat, str(tokenizer.eos_token)) for chat in chats]
    return render([[{"role": turn.role, "content": turn.text} for turn in chat] for chat in chats], tokenizer)


def with_system(prompt: Prompt, system: str | None) -> Chat:
    """The prompt's turns; the axis's prompt comes first, in one system turn with the dialogue's own."""
    chat = (Turn("user", prompt),) if isinstance(prompt, str) else prompt
    own = tuple(turn.text for turn in chat if turn.role == "system")
    head = "\n\n".join(text for text in (system or "", *own) if text)
    return (*((Turn("system", head),) if head else ()), *(turn for turn in chat if turn.role != "system"))


def _instruction_format(chat: Chat, end: str) -> str:
    """Alpaca's format, for tokenizers without a chat template."""
    intro = "Below is an instruction that describes a task. Write a response that completes the request."
    text = ""
    for turn in chat:
        if turn.role == "system":
            intro = turn.text
        elif turn.role == "user":
            text += f"\n\n### Instruction:\n{turn.text}\n\n### Response:\n"
        else:
            text += f"{turn.text}{end}"
    return intro + text


def encode(rows: list[Row], tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> list[Example]:
    """The prompt, the answer and the token that ends it; of a row without a response, the prompt alone."""
    if not rows:
        return []
    end = answer_end(tokenizer)
    prompts = encode_prompts([row.chat for row in rows], tokenizer, system)
    answers = tokenizer([row.response for row in rows], add_special_tokens=False)["input_ids"]
    examples = []
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        closed = (*answer, end) if row.response else ()
        examples.append(Example((*prompt, *closed), len(prompt), row.place))
    return examples


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id, or the end-of-sequence id if the tokenizer has none. Masks distinguish the two."""
    chosen = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert chosen is not None
    return int(chosen)
