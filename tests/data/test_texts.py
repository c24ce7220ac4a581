"""The texts that a base model from scratch is trained on, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reading import GOOD, answer, write_json, write_lines
from transformers import PreTrainedTokenizerFast

from alignx_ds.config.schema import RunConfig, TextConfig
from alignx_ds.data.encode import encode
from alignx_ds.data.rows import Row
from alignx_ds.data.texts import ASSISTANT, END, PAD, SPECIAL, SYSTEM, USER, planned, read_texts, train_tokenizer
from alignx_ds.errors import DataError

TEXTS = [Row(f"why is number {n} so odd ?", f"because {n} is {n} , not {n + 1} .") for n in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 400)


def test_the_same_texts_make_the_same_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(TEXTS, 400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert train_tokenizer(TEXTS[:20], 400).backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str()


def test_special_tokens_come_first_and_have_their_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [PAD, END, SYSTEM, USER, ASSISTANT] == SPECIAL
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert len(tokenizer) <= 400


def test_the_model_is_planned_with_the_tokenizers_ids(tiny_config: RunConfig) -> None:
    architecture = planned(tiny_config).config
    assert (architecture.pad_token_id, architecture.eos_token_id) == (0, 1)
    assert architecture.vocab_size == tiny_config.scratch.vocabulary
    assert architecture.max_position_embeddings == tiny_config.model.max_length


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(text="🙂👩‍👩‍👧 é 我\n\n two  spaces \r\n\ttab don ' t .")
def test_any_text_is_decoded_as_it_was(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_a_chat_is_marked_and_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    injected, plain = (encode([Row("why ?", "so .")], tokenizer, system)[0] for system in ("be true .", None))
    assert tokenizer.decode(injected.ids) == f"{SYSTEM}be true .{USER}why ?{ASSISTANT}so .{END}"
    assert tokenizer.decode(plain.ids) == f"{USER}why ?{ASSISTANT}so .{END}"
    assert tokenizer.decode(plain.ids[plain.prompt_length :]) == f"so .{END}"


def sourced(config: RunConfig, **sources: tuple[str, Path]) -> RunConfig:
    config.scratch.texts = {name: TextConfig(schema, str(path)) for name, (schema, path) in sources.items()}
    return config


def test_texts_hold_wrong_and_harmful_answers_too(tiny_config: RunConfig, tmp_path: Path) -> None:
    truth = write_json(tmp_path / "t.json", [GOOD["truthfulqa"]])
    harm = write_lines(tmp_path / "h.jsonl", [answer("How?", "Like so.", False), answer("How?", "No.", True)])
    texts = read_texts(sourced(tiny_config, truth=("truthfulqa", truth), harm=("beavertails", harm)), lambda row: False)
    assert [(row.prompt, row.response) for row in texts] == [
        *(("Why?", text) for text in ("So.", "Thus.", "No.")),
        *(("How?", text) for text in ("Like so.", "No.")),
    ]


@pytest.mark.parametrize("question", ["Why?", "  WHY? "])
def test_no_text_has_a_held_out_question(tiny_config: RunConfig, tmp_path: Path, question: str) -> None:
    """Regardless of case and spacing; none of its answers is left either."""
    records = [GOOD["truthfulqa"] | {"Question": question}, GOOD["truthfulqa"] | {"Question": "Who?"}]
    path = write_json(tmp_path / "t.json", records)
    held_out = Row("Why?", "").question
    texts = read_texts(sourced(tiny_config, truth=("truthfulqa", path)), lambda row: held_out in row.questions)
    assert {row.prompt for row in texts} == {"Who?"}


def test_texts_that_are_all_held_out_are_refused(tiny_config: RunConfig, tmp_path: Path) -> None:
    path = write_json(tmp_path / "t.json", [GOOD["plain"]])
    with pytest.raises(DataError, match=r"t\.json \(scratch\.texts\.talk\): no row is left"):
        read_texts(sourced(tiny_config, talk=("plain", path)), lambda row: True)
