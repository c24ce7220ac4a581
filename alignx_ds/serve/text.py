"""An answer's text while its tokens arrive: what is certain of it can be sent, and stop strings end it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # decoded in place of a character whose last bytes are still to come
BEFORE = 4  # tokens of the prompt that are decoded with the first ones of its continuation


class AnswerText:
    """The text of one answer; `add` and `finish` return the part of it that has become certain.

    What may be the beginning of a stop string is held back until it is none. With `strip`, white space around the
    answer is left out, as `alignx-ds generate` does. Without it the text continues the `prompt`, so that it may begin
    with a space.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        *,
        prompt: Sequence[int] = (),
        strip: bool = False,
    ) -> None:
        self._tokenizer, self._stop, self._strip = tokenizer, tuple(stop), strip
        self._tokens = [] if strip else list(prompt[-BEFORE:])
        # Tokens before `_read` are in the text, or the prompt's; those from `_begin` on are decoded again.
        self._begin, self._read = 0, len(self._tokens)
        self._text, self._sent = "", 0
        self.stopped = False  # whether a stop string has ended it

    def add(self, token: int) -> str:
        self._tokens.append(token)
        before = self._decode(self._begin, self._read)
        now = self._decode(self._begin, len(self._tokens))
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return self._more(now[len(before) :])

    def finish(self) -> str:
        """The rest, after the last token."""
        if not self.stopped:
            before = self._decode(self._begin, self._read)
            self._append(self._decode(self._begin, len(self._tokens))[len(before) :])
        return self._send(len(self._text.rstrip() if self._strip else self._text))

    def _decode(self, begin: int, end: int) -> str:
        """Without the tokens before, some tokenizers would leave out the space before a word."""
        text: str = self._tokenizer.decode(self._tokens[begin:end], skip_special_tokens=True)
        return text

    def _append(self, piece: str) -> None:
        longest = max(map(len, self._stop), default=0)
        start = max(0, len(self._text) - longest)
        self._text += piece
        if self._strip and not self._sent:
            self._text = self._text.lstrip()
        found = [at for at in (self._text.find(stop, start) for stop in self._stop) if at >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def _more(self, piece: str) -> str:
        self._append(piece)
        if self.stopped:
            return ""
        certain = len(self._text) - self._begun()
        return self._send(len(self._text[:certain].rstrip()) if self._strip else certain)

    def _begun(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        lengths = range(min(len(self._text), max(map(len, self._stop), default=0)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._text[-n:]) for stop in self._stop)), 0)

    def _send(self, end: int) -> str:
        piece, self._sent = self._text[self._sent : end], max(self._sent, end)
        return piece
