"""Rows that were encoded before are not encoded again, neither in this process nor in the ranks that it starts."""

from __future__ import annotations

import os

import pytest
from transformers import PreTrainedTokenizerBase

from alignx_ds.data import encodings
from alignx_ds.data.encode import encode
from alignx_ds.data.encodings import VARIABLE, Encodings
from alignx_ds.data.rows import Row, Turn

BEFORE = (Turn("user", "who are you ?"), Turn("assistant", "i am a frog ."))
ROWS = [
    Row("is the cat red ?", "it is blue .", place="a.json, row 1"),
    Row("is the cat red ?", "it is blue .", place="a.json, row 2"),
    Row("is the cat red ?", "", place="a.json, row 3"),
    Row("and the cat ?", "it is blue .", before=BEFORE, place="b.json, row 1"),
]
WAYS = ((None, False), ("be kind .", False), ("be kind .", True))


def refuse(rows: list[Row], *_: object, **__: object) -> list[object]:
    assert not rows, "all rows are known"
    return []


def test_what_is_known_is_what_encode_returns(
    world_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, expected = Encodings(world_tokenizer), [encode(ROWS, world_tokenizer, s, every_answer=e) for s, e in WAYS]
    assert len({tuple(examples) for examples in expected}) == len(WAYS)
    assert expected[2][3].earlier, "an answer of the dialogue is learned"
    for _ in range(2):
        found = [known.encode(ROWS, system, every_answer=every) for system, every in WAYS]
        assert found == expected
        assert [e.place for e in found[0]] == [row.place for row in ROWS]
        monkeypatch.setattr(encodings, "encode", refuse)
    with known.shared():
        elsewhere = Encodings(world_tokenizer)
        assert [elsewhere.encode(ROWS, system, every_answer=every) for system, every in WAYS] == expected
    assert VARIABLE not in os.environ


def test_what_another_tokenizer_has_made_is_not_used(
    world_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Encodings(world_tokenizer)
    known.encode(ROWS)
    monkeypatch.setattr(world_tokenizer, "chat_template", None)
    with known.shared():
        assert Encodings(world_tokenizer).encode(ROWS) == encode(ROWS, world_tokenizer) != known.encode(ROWS)


def test_a_file_without_rows_can_be_read(world_tokenizer: PreTrainedTokenizerBase) -> None:
    with Encodings(world_tokenizer).shared():
        assert Encodings(world_tokenizer).encode([]) == []
