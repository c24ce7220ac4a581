"""The token ids that begin a user turn, as an aligned model finds the last one in its prompt (mocae/turns.py).

They are seen by writing dialogues as for training and comparing the token ids, so that they hold for any template.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import product, takewhile

from transformers import PreTrainedTokenizerBase

from alignx_ds.data.encode import encode_prompts
from alignx_ds.data.literal import LiteralEncoder
from alignx_ds.data.rows import Chat, Turn
from alignx_ds.errors import DataError
from alignx_ds.models.ends import answer_end
from alignx_ds.models.templates import template_of

Ids = tuple[int, ...]

# Texts that begin and end in ways of their own: a tokenizer may join a text's first or last character with what the
# template writes beside it, and a small vocabulary may not know some of them.
ASKED = ("hello", "Why ?", "\n\nhello", "7 + 1", "(so)", "你好")
SAID = ("good night .", "hello", "42", "(so)", "yes")


def user_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The longest sequence that begins every user turn, or if there is none, every one but the first.

    It holds a special token, which a user's text never has (literal.py), so that no text can be taken for a turn. It is
    empty where there is no such sequence: dialogues without a chat template, or one that refuses them.
    """
    template = template_of(tokenizer)
    return list(_found(tokenizer, template.text)) if template is not None else []


@lru_cache(maxsize=16)
def _found(tokenizer: PreTrainedTokenizerBase, template: str) -> Ids:
    """`template` is the tokenizer's: a part of the cache's key, because it may be changed."""
    special = {int(tokenizer.convert_tokens_to_ids(token)) for token in LiteralEncoder(tokenizer).special}
    try:
        first = _before(tokenizer, [()])
        after_system = _before(tokenizer, [(Turn("system", text),) for text in SAID])
        later = _before(tokenizer, [_exchange(asked, said) for asked, said in zip(ASKED, SAID, strict=False)])
        for begins in ((first, after_system, later), (after_system, later), (first, later), (later,)):
            ids = _trimmed(_common_end(begins), special, answer_end(tokenizer))
            if ids and _begins_user_turns(ids, tokenizer):
                return ids
    except DataError:  # the template refuses such a dialogue
        pass
    return ()


def _exchange(asked: str, said: str) -> Chat:
    return Turn("user", asked), Turn("assistant", said)


def _before(tokenizer: PreTrainedTokenizerBase, starts: list[Chat]) -> Ids:
    """What stands right before a user's text, after any of these turns."""
    prompts = encode_prompts([(*start, Turn("user", text)) for start, text in product(starts, ASKED)], tokenizer)
    each = [_common_start(prompts[n : n + len(ASKED)]) for n in range(0, len(prompts), len(ASKED))]
    return _common_end(each)


def _common_start(rows: Iterable[list[int]]) -> Ids:
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return tuple(column[0] for column in columns)


def _common_end(rows: Iterable[Ids]) -> Ids:
    return _common_start([list(row[::-1]) for row in rows])[::-1]


def _trimmed(ids: Ids, special: set[int], end: int) -> Ids:
    """From the first special token on, without the end of the answer before; empty where no special token is left."""
    after_end = len(ids) - ids[::-1].index(end) if end in ids else 0
    for start in (after_end, 0):
        own = next((i for i in range(start, len(ids)) if ids[i] in special), None)
        if own is not None:
            return ids[own:]
    return ()


def _begins_user_turns(ids: Ids, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the ids stand at the user turns of a dialogue, the first perhaps apart, and nowhere else."""
    questions = ("hello", "good night .", "Why ?")
    turns = [_exchange(text, text) for text in questions]
    for count in (2, 3):
        chat = (Turn("system", "hello"), *(turn for pair in turns[:count] for turn in pair))[:-1]
        (prompt,) = encode_prompts([chat], tokenizer)
        found = sum(tuple(prompt[n : n + len(ids)]) == ids for n in range(len(prompt)))
        if found not in (count, count - 1):
            return False
    return True
