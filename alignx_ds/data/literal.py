"""Special tokens inside what people wrote are text: "</s>" in a question must not end it.

A chat template mixes texts with special tokens of its own. So the texts are escaped before the template writes them,
and what is escaped is encoded as text afterwards, by a copy of the tokenizer in which only the template's own special
tokens are special. All other texts go through the tokenizer as they are.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from alignx_ds.errors import DataError

# Characters for private use, which no vocabulary has as words.
ESCAPE, FIRST_ESCAPED = "\U000ffffd", 0xF0000  # followed by one character for each special token, or by itself
OWN, FIRST_OWN = "\U0010fffd", 0x100000  # the template's own special tokens, in the copy of the tokenizer
ESCAPED = re.compile(f"({ESCAPE}.)", re.DOTALL)


@dataclass(frozen=True)
class EncodedText:
    """Token ids, and the characters (start, end) of the text that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class LiteralEncoder:
    """Encodes texts that a template made of escaped ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special = tuple(sorted({*added, *tokenizer.all_special_tokens} - {""}, key=lambda t: (-len(t), t)))
        self._any = re.compile("|".join(map(re.escape, (*self.special, ESCAPE))))

    def escape(self, text: str) -> str:
        """The text with a stand-in for every special token in it; `encode` makes it text again."""
        return self._any.sub(lambda found: f"{ESCAPE}{self._stand_in(found[0])}", text)

    def encode(self, texts: list[str], *, add_special_tokens: bool, offsets: bool = False) -> list[EncodedText]:
        """The token ids of rendered texts; without `offsets`, those may be empty. Raises DataError."""
        plain = [text for text in texts if ESCAPE not in text]
        found: dict[str, Any] = {"input_ids": []}
        if plain:
            found = dict(self.tokenizer(plain, add_special_tokens=add_special_tokens, return_offsets_mapping=offsets))
        ids, places = iter(found["input_ids"]), iter(found.get("offset_mapping", [[]] * len(plain)))
        return [
            self._literal(text, add_special_tokens)
            if ESCAPE in text
            else EncodedText(list(next(ids)), [tuple(place) for place in next(places)])
            for text in texts
        ]

    def _stand_in(self, token: str) -> str:
        return ESCAPE if token == ESCAPE else chr(FIRST_ESCAPED + self.special.index(token))

    def _literal(self, text: str, add_special_tokens: bool) -> EncodedText:
        """The template's own special tokens are replaced by the copy's, and what is escaped by what was written."""
        if OWN in text:
            raise DataError(f"a text has a special token and the private character U+{ord(OWN):X}; remove one of them")
        copy, own = _copy_of(self.tokenizer, self.special)
        written: list[tuple[str, int, int]] = []  # a piece of the text for the copy, and where it stands in `text`
        start = 0
        for number, part in enumerate(ESCAPED.split(text)):
            end = start + len(part)
            if number % 2:
                code = part[1]
                written.append((code if code == ESCAPE else self.special[ord(code) - FIRST_ESCAPED], start, end))
            else:
                last = start
                for found in self._any.finditer(part):
                    at = start + found.start()
                    written += [(c, last + i, last + i + 1) for i, c in enumerate(text[last:at])]
                    last = at + len(found[0])
                    written.append((_own(self.special.index(found[0])), at, last))
                written += [(c, last + i, last + i + 1) for i, c in enumerate(text[last:end])]
            start = end
        origin = [(a, b) for piece, a, b in written for _ in piece]
        encoding = copy.encode("".join(piece for piece, _, _ in written), add_special_tokens=add_special_tokens)
        ids = [
            token if added else self._as_text(token, own)
            for token, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        ]
        offsets = [(origin[a][0], origin[b - 1][1]) if b > a else (0, 0) for a, b in encoding.offsets]
        return EncodedText(ids, offsets)

    def _as_text(self, token: int, own: dict[int, int]) -> int:
        """The id in the tokenizer itself; for a word that is a special token and nothing else, the unknown word's."""
        if token in own:
            return own[token]
        if token not in own.values():
            return token
        unknown = self.tokenizer.unk_token_id
        if unknown is None:
            name = self.tokenizer.convert_ids_to_tokens(token)
            raise DataError(f"a text has {name!r}, which this tokenizer can't write as text; remove it from the rows")
        return int(unknown)


def _own(number: int) -> str:
    return f"{OWN}{chr(FIRST_OWN + number)}"


@lru_cache(maxsize=4)
def _copy_of(tokenizer: PreTrainedTokenizerBase, special: tuple[str, ...]) -> tuple[Tokenizer, dict[int, int]]:
    """A copy in which the special tokens' names are text, and other names stand for them; and its ids for them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        problem = f"a text has a special token, which a {type(tokenizer).__name__} can't write as text"
        raise DataError(f"{problem}; save the tokenizer as a tokenizer.json, or remove it from the rows")
    state = json.loads(backend.to_str())
    flags: dict[str, Any] = {token["content"]: token for token in state["added_tokens"]}
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["content"] in special
    copy = Tokenizer.from_str(json.dumps(state))
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    same = ("lstrip", "rstrip", "single_word")
    own = {}
    for number, name in enumerate(special):
        kept = {key: flags[name][key] for key in same if name in flags}
        copy.add_tokens([AddedToken(_own(number), normalized=False, special=False, **kept)])
        stands_for, number_in_copy = backend.token_to_id(name), copy.token_to_id(_own(number))
        if stands_for is not None and number_in_copy is not None:
            own[number_in_copy] = stands_for
    return copy, own
