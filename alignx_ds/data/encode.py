"""Rows to token ids: the prompt as the tokenizer's chat template writes it, then the answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignx_ds.data.chats import Prompt, answer_place, with_system, written
from alignx_ds.data.labels import LabelSet, multi_hot, source_weights
from alignx_ds.data.literal import EncodedText, LiteralEncoder
from alignx_ds.data.rows import Chat, Row
from alignx_ds.models.ends import answer_end
from alignx_ds.models.templates import answer_lead, template_of


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its answer; the answer starts at index `prompt_length`.

    `earlier` has the spans (start, end) of the answers within the prompt that are learned too.
    """

    ids: tuple[int, ...]
    prompt_length: int
    place: str = field(default="", compare=False)  # file and row, for error messages
    earlier: tuple[tuple[int, int], ...] = ()

    @property
    def learned_length(self) -> int:
        """The number of tokens that have a label."""
        return self.answer_length + sum(end - start for start, end in self.earlier)

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
    """Examples, each with the number of the expert that owns it and the set of those that its prompt needs.

    The owner is the expert whose source the row is from; `sources` number its sources. Without `needs`, each row needs
    its owner; without `sources`, each expert has a single one. `others` are second answers to the same prompts, which
    share the micro batch of the first, or none.
    """

    examples: list[Example]
    experts: list[int]
    needs: list[LabelSet] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    others: list[Example] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.needs:
            self.needs.extend((expert,) for expert in self.experts)
        if not self.sources:
            self.sources.extend([0] * len(self.experts))
        self._check()

    @property
    def learned_share(self) -> float:
        """Of all tokens, those that have a label."""
        return sum(e.learned_length for e in self.examples) / max(1, sum(len(e.ids) for e in self.examples))

    def _check(self) -> None:
        assert len(self.examples) == len(self.experts) == len(self.needs) == len(self.sources)
        assert len(self.others) in (0, len(self.examples))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, with those of its other answer."""
        lengths = [len(example.ids) for example in self.examples]
        return [a + len(b.ids) for a, b in zip(lengths, self.others, strict=True)] if self.others else lengths

    def at(self, numbers: Sequence[int]) -> list[Example]:
        """The examples with these numbers, and after them their other answers."""
        return [part[number] for part in (self.examples, self.others) if part for number in numbers]

    @property
    def digest(self) -> str:
        """As of examples, with all that is known of each."""
        labels = [getattr(self, f.name) for f in fields(self) if f.name not in ("examples", "others")]
        return hashlib.sha256(f"{digest(self.examples)} {labels}".encode()).hexdigest()

    @property
    def width(self) -> int:
        """The number of experts: every axis has rows, so the highest id is that of the last one."""
        return 1 + max((*self.experts, *(expert for needed in self.needs for expert in needed)), default=0)

    def multi_hot(self, experts: int) -> Tensor:
        """The label sets [N, E] fp32, of so many experts."""
        return multi_hot(self.needs, experts)

    def weights(self) -> Tensor | None:
        """[N] fp32: what each row counts when a gate is fitted; None where every expert has a single source."""
        return source_weights(self.experts, self.sources)

    def add(
        self,
        examples: list[Example],
        expert: int,
        needs: Sequence[LabelSet] | None = None,
        sources: Sequence[int] | None = None,
    ) -> None:
        """More rows of one expert; without `needs` each needs this expert alone, without `sources` there is one."""
        self.examples.extend(examples)
        self.experts.extend([expert] * len(examples))
        self.needs.extend([(expert,)] * len(examples) if needs is None else needs)
        self.sources.extend([0] * len(examples) if sources is None else sources)
        self._check()


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, system: str | None = None
) -> list[list[int]]:
    """Token ids up to where each answer begins; `system` is the axis's injected prompt."""
    encoder = LiteralEncoder(tokenizer)
    chats = [_escaped(with_system(prompt, system), encoder) for prompt in prompts]
    return [encoded.ids for encoded in _encode_texts(written(chats, tokenizer), encoder)]


def encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of prompts that are written already, as `prompt_texts` does."""
    return [encoded.ids for encoded in _encode_texts(texts, LiteralEncoder(tokenizer))]


def prompt_texts(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> list[str]:
    """The text up to where each answer begins, special tokens included if the tokenizer has a chat template."""
    return written([with_system(prompt, system) for prompt in prompts], tokenizer)


def encode(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, system: str | None = None, *, every_answer: bool = False
) -> list[Example]:
    """The prompt, the answer and the token that ends it; of a row without a response, the prompt alone.

    With `every_answer`, the earlier answers of a dialogue are learned too, where the template lets it.
    """
    if not rows:
        return []
    encoder, end = LiteralEncoder(tokenizer), answer_end(tokenizer)
    chats = [_escaped(with_system(row.chat, system), encoder) for row in rows]
    texts = written(chats, tokenizer)
    prompts = _encode_texts(texts, encoder, offsets=every_answer)
    lead = answer_lead(tokenizer)
    answers = encoder.encode([lead + encoder.escape(row.response) for row in rows], add_special_tokens=False)
    examples = []
    for row, chat, text, prompt, answer in zip(rows, chats, texts, prompts, answers, strict=True):
        closed = (*answer.ids, end) if row.response else ()
        earlier = _learned(chat, text, prompt, encoder) if every_answer and row.response else ()
        examples.append(Example((*prompt.ids, *closed), len(prompt.ids), row.place, earlier))
    return examples


def _escaped(chat: Chat, encoder: LiteralEncoder) -> Chat:
    return tuple(replace(turn, text=encoder.escape(turn.text)) for turn in chat)


def _encode_texts(texts: list[str], encoder: LiteralEncoder, *, offsets: bool = False) -> list[EncodedText]:
    """Prompts as tokens. A chat template has written their special tokens; otherwise the tokenizer adds its own.

    Some tokenizers add special tokens after a text too; they are left out, because its answer is still to come.
    """
    if template_of(encoder.tokenizer) is not None:
        return encoder.encode(texts, add_special_tokens=False, offsets=offsets)
    closing = set(encoder.tokenizer.all_special_ids)
    found = []
    for text in encoder.encode(texts, add_special_tokens=True, offsets=offsets):
        length = next((i for i in range(len(text.ids), 0, -1) if text.ids[i - 1] not in closing), 0)
        found.append(EncodedText(text.ids[:length], text.offsets[:length]))
    return found


def _learned(chat: Chat, text: str, prompt: EncodedText, encoder: LiteralEncoder) -> tuple[tuple[int, int], ...]:
    """The spans of tokens of a dialogue's earlier answers.

    None of them if one does not follow what the model sees when it gives that answer: some templates write an answer
    otherwise once the dialogue goes on.
    """
    answered = [i for i, turn in enumerate(chat) if turn.role == "assistant" and turn.learned]
    if not answered or not encoder.tokenizer.is_fast:
        return ()
    learned: set[int] = set()
    for i, seen in zip(answered, written([chat[:i] for i in answered], encoder.tokenizer), strict=True):
        begin = _end_of(seen, text, prompt, encoder)
        place = None if begin is None else answer_place(text, begin, chat[i].text, encoder.tokenizer)
        if place is None:
            return ()
        learned |= {n for n, (start, end) in enumerate(prompt.offsets) if place.covers(start, end)}
    starts, ends = (sorted(n for n in learned if n + step not in learned) for step in (-1, 1))
    return tuple((start, end + 1) for start, end in zip(starts, ends, strict=True))


def _end_of(seen: str, text: str, prompt: EncodedText, encoder: LiteralEncoder) -> int | None:
    """Where a shorter prompt ends in the text of a longer one; None if the longer one does not begin with it.

    They may differ in white space that no token stands for.
    """
    if text.startswith(seen):
        return len(seen)
    (tokens,) = _encode_texts([seen], encoder)
    begins = prompt.ids[: len(tokens.ids)] == tokens.ids
    return prompt.offsets[len(tokens.ids) - 1][1] if begins else None


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id, or the end-of-sequence id if the tokenizer has none. Masks distinguish the two."""
    chosen = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert chosen is not None
    return int(chosen)
