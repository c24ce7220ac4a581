"""Dialogues as text: in the tokenizer's chat template, or in Alpaca's format, and where their answers stand in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from alignx_ds.data.rows import Chat, Turn
from alignx_ds.models.templates import answer_lead, render, template_of

Prompt = str | Chat  # a question, or a dialogue up to its last user turn
INTRO = "Below is an instruction that describes a task. Write a response that completes the request."


@dataclass(frozen=True)
class AnswerPlace:
    """Where an earlier answer stands in a rendered dialogue: its text, and the token that ends it, if there is one.

    `prompt` is the length of what the model sees when it gives the answer. The text includes the white space before it
    that every answer begins with, where the template writes some.
    """

    prompt: int
    text: tuple[int, int]
    end: tuple[int, int]

    def covers(self, start: int, end: int) -> bool:
        """Whether a token of these characters belongs to it, at least in part."""
        return start >= self.prompt and any(start < last and first < end for first, last in (self.text, self.end))


def with_system(prompt: Prompt, system: str | None) -> Chat:
    """The prompt's turns; the axis's prompt comes first, in one system turn with the dialogue's own."""
    chat = (Turn("user", prompt),) if isinstance(prompt, str) else prompt
    own = tuple(turn.text for turn in chat if turn.role == "system")
    head = "\n\n".join(text for text in (system or "", *own) if text)
    return (*((Turn("system", head),) if head else ()), *(turn for turn in chat if turn.role != "system"))


def written(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text up to where each answer begins, special tokens included if the tokenizer has a chat template."""
    if template_of(tokenizer) is None:
        return [_instruction_format(chat, written_end(tokenizer)) for chat in chats]
    return render([[{"role": turn.role, "content": turn.text} for turn in chat] for chat in chats], tokenizer)


def answer_place(text: str, begin: int, answer: str, tokenizer: PreTrainedTokenizerBase) -> AnswerPlace | None:
    """Where an answer stands that should follow the first `begin` characters; None if it does not."""
    start = begin + _white_space(text[begin:])
    last = start + len(answer)
    if text[start:last] != answer:
        return None
    lead = answer_lead(tokenizer)
    if text.startswith(lead, begin):
        start = min(start, begin + len(lead)) - len(lead)  # learned with every answer
    closing, end = last + _white_space(text[last:]), written_end(tokenizer)
    closed = bool(end) and text.startswith(end, closing)
    return AnswerPlace(begin, (start, last), (closing, closing + len(end)) if closed else (last, last))


def written_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What is written after an answer; empty: nothing."""
    template = template_of(tokenizer)
    return str(tokenizer.eos_token) if template is None else template.end


def _white_space(text: str) -> int:
    return len(text) - len(text.lstrip())


def _instruction_format(chat: Chat, end: str) -> str:
    """Alpaca's format, for tokenizers without a chat template."""
    intro, text = INTRO, ""
    for turn in chat:
        if turn.role == "system":
            intro = turn.text
        elif turn.role == "user":
            text += f"\n\n### Instruction:\n{turn.text}\n\n### Response:\n"
        else:
            text += f"{turn.text}{end}"
    return intro + text
