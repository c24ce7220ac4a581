"""How a tokenizer's chat template writes a dialogue. What it does with a system prompt is found out by rendering it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Literal

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from alignx_ds.errors import DataError
from alignx_ds.models.tokenizer import default_template

Message = dict[str, str]  # with a "role" and its "content"
Chat = Sequence[Message]

# The day that templates write which ask for today's (Llama 3's own default): the same rows on every day.
DAY = datetime(2024, 7, 26)
TODAY = re.compile(r"""\bstrftime_now\(\s*(['"])([^'"]*)\1\s*\)""")
SYSTEM, USER, ANSWER = "alignx-system-prompt", "alignx-question", "alignx-answer"  # found again in what is rendered


class _RenderingError(Exception):
    """What a template raised: it is a program, and may raise anything."""


@dataclass(frozen=True)
class Template:
    """A chat template and what it was seen to do."""

    text: str
    system: Literal["written", "refused", "dropped"]  # what becomes of a system message
    default_system: str  # the system prompt that it writes where a dialogue has none
    end: str  # the special token that it writes after an answer; empty: none
    dated: bool  # whether it writes the day's date


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The template that writes the tokenizer's dialogues, or None. Raises DataError for one that can't be rendered."""
    text = default_template(tokenizer)
    return None if text is None else _examined(tokenizer, text)


def render(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, *, generation_prompt: bool = True) -> list[str]:
    """The text of each dialogue, special tokens included; the tokenizer has to have a chat template.

    A system prompt that the template does not write goes into the first user turn. Raises DataError for a dialogue that
    the template refuses.
    """
    template = template_of(tokenizer)
    assert template is not None
    if template.system != "written":
        chats = [with_system_in_user_turn(chat) for chat in chats]
    try:
        return _rendered(chats, tokenizer, generation_prompt)
    except _RenderingError as error:
        for chat in chats:
            _render_one(chat, tokenizer, generation_prompt)
        raise DataError(f"the chat template can't be rendered ({error})") from error


def with_system_in_user_turn(chat: Chat) -> Chat:
    """The dialogue without its system message, whose text stands before the first user turn's."""
    if not chat or chat[0]["role"] != "system":
        return chat
    system, *turns = chat
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first is None:
        return [system | {"role": "user"}, *turns]
    joined = turns[first] | {"content": f"{system['content']}\n\n{turns[first]['content']}"}
    return [*turns[:first], joined, *turns[first + 1 :]]


def on_day(template: str, day: datetime) -> str:
    """The template with this day in place of the current one. transformers takes no function as an argument."""
    return TODAY.sub(lambda found: f'"{day.strftime(found[2])}"', template)


def _render_one(chat: Chat, tokenizer: PreTrainedTokenizerBase, generation_prompt: bool) -> None:
    try:
        _rendered([chat], tokenizer, generation_prompt)
    except _RenderingError as error:
        begin = str(chat[-1].get("content", ""))[:60] if chat else ""
        roles = ", ".join(str(turn.get("role")) for turn in chat)
        problem = f"the chat template refuses a dialogue of {roles} that ends {begin!r} ({error})"
        raise DataError(f"{problem}; correct the row or the template") from error


def _rendered(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, generation_prompt: bool, day: datetime = DAY
) -> list[str]:
    if not chats:
        return []
    try:
        texts: list[str] = tokenizer.apply_chat_template(
            [list(chat) for chat in chats],
            chat_template=on_day(default_template(tokenizer) or "", day),
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except Exception as error:
        line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
        raise _RenderingError(f"{type(error).__name__}: {line}{' '.join(str(error).split())[:160]}") from error
    return texts


@lru_cache(maxsize=16)
def _examined(tokenizer: PreTrainedTokenizerBase, text: str) -> Template:
    """`text` is the tokenizer's template: a part of the cache's key, because it may be changed."""
    user, system = {"role": "user", "content": USER}, {"role": "system", "content": SYSTEM}
    try:
        (plain,) = _rendered([[user]], tokenizer, True)
    except _RenderingError as error:
        raise DataError(f"the chat template can't be rendered ({error}); correct it") from error
    if USER not in plain:
        raise DataError("the chat template does not write the user's message when it is a text; use another template")
    try:
        (both,) = _rendered([[system, user]], tokenizer, True)
    except _RenderingError:
        both = None
    kept = both is not None and SYSTEM in both and USER in both
    return Template(
        text=text,
        system="refused" if both is None else "written" if kept else "dropped",
        default_system=_between(plain, both) if both is not None and kept else "",
        end=_end(tokenizer),
        dated=_rendered([[user]], tokenizer, True, DAY + timedelta(days=400)) != [plain],
    )


def _between(plain: str, both: str) -> str:
    """What stands in `plain` where `both` has the system prompt, if they are alike around it."""
    before, _, after = both.partition(SYSTEM)
    length = len(plain) - len(before) - len(after)
    alike = length > 0 and plain.startswith(before) and plain.endswith(after)
    return plain[len(before) : len(before) + length].strip() if alike else ""


def _end(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token right after an answer, but for white space."""
    try:
        chat = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
        (text,) = _rendered([chat], tokenizer, False)
    except _RenderingError:
        return ""
    _, answer, rest = text.rpartition(ANSWER)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = [token for token in special if answer and rest.lstrip().startswith(token) and token != _begin(tokenizer)]
    return max(found, key=len, default="")


def _begin(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that begins a text, if it ends none."""
    begin: str | None = tokenizer.bos_token
    return None if begin == tokenizer.eos_token else begin
