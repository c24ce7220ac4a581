"""An answer's text as its tokens arrive: nothing is sent that a later token could take back."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from alignx_ds.serve.text import AnswerText

LETTERS = "ab \né"


class Bytes:
    """A tokenizer whose tokens are bytes, so that a letter may need two; 0 is a special token."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(token for token in tokens if token).decode(errors="replace")


def pieces(text: str, stop: tuple[str, ...], *, strip: bool, prompt: str = "") -> tuple[list[str], bool]:
    tokenizer: Any = Bytes()
    answer = AnswerText(tokenizer, stop, prompt=list(prompt.encode()), strip=strip)
    found = []
    for token in text.encode():
        found.append(answer.add(token))
        if answer.stopped:
            break
    return [*found, answer.finish()], answer.stopped


def whole(text: str, stop: tuple[str, ...], *, strip: bool) -> tuple[str, bool]:
    """The same from the whole text: cut where a stop string is complete first."""
    text = text.lstrip() if strip else text
    ends = [text.find(one) + len(one) for one in stop if one in text]
    if ends:
        text = text[: min(text.find(one) for one in stop if one in text[: min(ends)])]
    return text.rstrip() if strip else text, bool(ends)


@given(
    st.text(LETTERS, max_size=12),
    st.lists(st.text(LETTERS, min_size=1, max_size=3), max_size=3),
    st.booleans(),
    st.text(LETTERS, max_size=6),
)
@settings(max_examples=400, deadline=None)
def test_the_pieces_make_the_whole(text: str, stop: list[str], strip: bool, prompt: str) -> None:
    found, stopped = pieces(text, tuple(stop), strip=strip, prompt=prompt)
    assert ("".join(found), stopped) == whole(text, tuple(stop), strip=strip)


def test_only_what_may_be_a_stop_string_is_held_back() -> None:
    found, stopped = pieces("abba b", ("bbb", "a b!"), strip=False)
    assert found == ["", "a", "", "bb", "", "", "a b"] and not stopped


def test_a_character_is_sent_when_it_is_complete() -> None:
    assert pieces("aé", (), strip=False)[0] == ["a", "", "é", ""]


def test_a_special_token_is_no_text() -> None:
    tokenizer: Any = Bytes()
    answer = AnswerText(tokenizer)
    assert [answer.add(token) for token in (97, 0, 98)] == ["a", "", "b"]
