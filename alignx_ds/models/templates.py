"""How a tokenizer's chat template writes a dialogue. What it does with a system prompt is found out by rendering it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Literal

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from alignx_ds.errors import DataError
from alignx_ds.models.tokenizer import default_template, with_arguments

Message = dict[str, str]  # with a "role" and its "content"
Chat = Sequence[Message]

# The day that templates write which ask for today's (Llama 3's own default): the same rows on every day.
DAY = datetime(2024, 7, 26)
THOUGHTS = re.compile(r"<(/?)([\w:]*think\w*|thoughts?|reason\w*)>")
TODAY = re.compile(r"""\bstrftime_now\(\s*(['"])([^'"]*)\1\s*\)""")
LONGEST = 200_000  # characters of a dialogue with one short question: longer ones take minutes to encode
SYSTEM, USER, ANSWER = "alignx-system-prompt", "alignx-question", "alignx-answer"  # found again in what is rendered


class _RenderingError(Exception):
    """What a template raised: it is a program, and may raise anything."""


@dataclass(frozen=True)
class Template:
    """A chat template and what it was seen to do."""

    text: str
    system: Literal["written", "refused", "dropped"]  # what becomes of a system message
    default_system: str  # the system prompt that it writes where a dialogue has none
    lead: str  # the white space that it writes between the prompt and an answer
    end: str  # the special token that it writes after an answer; empty: none
    dated: bool  # whether it writes the day's date
    thinking: str  # the tag of a block that it opens before an answer and leaves open, like <think>; empty: none


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The template that writes the tokenizer's dialogues, or None. Raises DataError for one that can't be rendered."""
    text = default_template(tokenizer)
    return None if text is None else _examined(tokenizer, text)


def answer_lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """The white space before every answer, a part of the answer: models see the prompt without it."""
    template = template_of(tokenizer)
    return "" if template is None else template.lead


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


def changes_what_is_written(name: str, value: Any, template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a dialogue is written otherwise with another value of this argument of the template, or without it."""
    other = not value if isinstance(value, bool) else f"{value}, not" if isinstance(value, str) else value + 1
    with_it, with_other = (with_arguments(template, {name: v}) for v in (value, other))
    user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": f"<think>{USER}</think>{ANSWER}"}
    for chat in ([user], [{"role": "system", "content": SYSTEM}, user], [user, answer, user]):
        if len({_outcome(chat, tokenizer, text) for text in (template, with_it, with_other)}) > 1:
            return True
    return False


def _outcome(chat: Chat, tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    try:
        return _rendered([chat], tokenizer, True, template=template)[0]
    except _RenderingError as error:
        return str(error)


def _rendered(
    chats: Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    generation_prompt: bool,
    *,
    day: datetime = DAY,
    template: str | None = None,
) -> list[str]:
    """The dialogues as the tokenizer's template, or as another one, writes them."""
    if not chats:
        return []
    try:
        texts: list[str] = tokenizer.apply_chat_template(
            [list(chat) for chat in chats],
            chat_template=on_day(template or default_template(tokenizer) or "", day),
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
    if len(plain) > LONGEST:
        raise DataError(f"the chat template writes {len(plain):,} characters for one short question; correct it")
    if USER not in plain:
        raise DataError("the chat template does not write the user's message when it is a text; use another template")
    try:
        (both,) = _rendered([[system, user]], tokenizer, True)
    except _RenderingError:
        both = None
    answered = _answered(tokenizer)
    kept = both is not None and SYSTEM in both and USER in both
    return Template(
        text=text,
        system="refused" if both is None else "written" if kept else "dropped",
        default_system=_between(plain, both) if both is not None and kept else "",
        lead=_lead(plain, answered, tokenizer),
        end=_end(answered, tokenizer),
        dated=_rendered([[user]], tokenizer, True, day=DAY + timedelta(days=400)) != [plain],
        thinking=_open_block(plain),
    )


def _between(plain: str, both: str) -> str:
    """What stands in `plain` where `both` has the system prompt, if they are alike around it."""
    before, _, after = both.partition(SYSTEM)
    length = len(plain) - len(before) - len(after)
    alike = length > 0 and plain.startswith(before) and plain.endswith(after)
    return plain[len(before) : len(before) + length].strip() if alike else ""


def _open_block(prompt: str) -> str:
    tags = list(THOUGHTS.finditer(prompt, prompt.rfind(USER)))
    return tags[-1][0] if tags and not tags[-1][1] else ""


def _answered(tokenizer: PreTrainedTokenizerBase) -> str:
    """A question with its answer; empty where the template refuses that."""
    try:
        chat = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
        return _rendered([chat], tokenizer, False)[0]
    except _RenderingError:
        return ""


def _lead(plain: str, answered: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The white space before an answer, unless the tokenizer puts it before every text by itself."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    between = answered[len(plain) : answered.rfind(ANSWER)]
    if not answered.startswith(plain) or not between or not between.isspace():
        return ""
    whole, prompt = tokens(f"{plain}{between}{ANSWER}"), tokens(plain)
    return between if whole == [*prompt, *tokens(between + ANSWER)] else ""


def _end(answered: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token right after an answer, but for white space."""
    _, answer, rest = answered.rpartition(ANSWER)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = [token for token in special if answer and rest.lstrip().startswith(token) and token != _begin(tokenizer)]
    return max(found, key=len, default="")


def _begin(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that begins a text, if it ends none."""
    begin: str | None = tokenizer.bos_token
    return None if begin == tokenizer.eos_token else begin
