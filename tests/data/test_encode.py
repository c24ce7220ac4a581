"""Rows to token ids: the ids of the chat template, and the loss on the answers alone."""

from __future__ import annotations

import pytest
from reading import world_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignx_ds.data.batches import IGNORED, collate, pack
from alignx_ds.data.encode import encode, encode_prompts, pad_token
from alignx_ds.data.rows import Row

SYSTEM = "you are a helpful assistant . do the task with care ."
PAD = 999


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so that any text can be read back; it has no chat template and no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "</s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_ids_are_what_the_chat_template_writes(world_tokenizer: PreTrainedTokenizerBase, system: str | None) -> None:
    for schema in ("alpaca", "beavertails", "truthfulqa", "plain"):
        for row in world_rows(schema, held_out=False, limit=20):
            chat = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.response}]
            if system:
                chat.insert(0, {"role": "system", "content": system})
            whole = world_tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
            (example,) = encode([row], world_tokenizer, system)
            assert list(example.ids) == whole


def test_the_loss_is_on_the_answer_and_its_end_alone(world_tokenizer: PreTrainedTokenizerBase) -> None:
    row = Row("give the first word . dog cat", "dog")
    batch = collate(encode([row], world_tokenizer, SYSTEM), pad_token(world_tokenizer))
    learned = batch.labels[batch.labels != IGNORED]
    assert world_tokenizer.convert_ids_to_tokens(learned.tolist()) == ["dog", "<eos>"]
    prompt = world_tokenizer.decode(batch.input_ids[batch.prompt_mask == 1])
    assert SYSTEM in prompt
    assert row.prompt in prompt
    assert prompt.endswith("<assistant>")


def test_without_a_system_prompt_none_is_written(world_tokenizer: PreTrainedTokenizerBase) -> None:
    injected, plain = (encode_prompts(["hello"], world_tokenizer, system)[0] for system in (SYSTEM, None))
    assert "<system>" in world_tokenizer.convert_ids_to_tokens(injected)
    assert "<system>" not in world_tokenizer.convert_ids_to_tokens(plain)


def test_a_tokenizer_without_a_template_gets_the_instruction_format(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    (injected,) = encode([Row("Add 1 and 2.", "3")], byte_tokenizer, "Be good.")
    assert byte_tokenizer.decode(injected.ids) == ("Be good.\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n3</s>")
    assert byte_tokenizer.decode(injected.ids[injected.prompt_length :]) == "3</s>"
    plain = byte_tokenizer.decode(encode_prompts(["Add 1 and 2."], byte_tokenizer)[0])
    assert plain.endswith("\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n")
    assert "Be good." not in plain


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_a_row_without_a_response_is_its_prompt_alone(
    world_tokenizer: PreTrainedTokenizerBase, byte_tokenizer: PreTrainedTokenizerFast, system: str | None
) -> None:
    """It has no labels, not even for the end of the sequence."""
    for tokenizer in (world_tokenizer, byte_tokenizer):
        (prompt, answered) = encode([Row("good night .", ""), Row("good night .", "sleep well .")], tokenizer, system)
        assert prompt.answer_length == 0
        assert prompt.ids == answered.ids[: answered.prompt_length]
        for batch in (collate([prompt, answered], PAD), pack([prompt, answered], PAD)):
            assert int((batch.labels != IGNORED).sum()) == answered.answer_length
        assert (collate([prompt], PAD).labels == IGNORED).all()


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_rows_that_are_encoded_together_do_not_touch_each_other(
    world_tokenizer: PreTrainedTokenizerBase, byte_tokenizer: PreTrainedTokenizerFast, system: str | None
) -> None:
    """Their lengths differ, and there is no padding in the result."""
    rows = [Row("hello , how are you ?", "i am well , thank you ."), Row("good night .", "sleep well .")]
    for tokenizer in (world_tokenizer, byte_tokenizer):
        together = encode(rows, tokenizer, system)
        assert together == [encode([row], tokenizer, system)[0] for row in rows]
        prompts = encode_prompts([row.prompt for row in rows], tokenizer, system)
        assert prompts == [list(example.ids[: example.prompt_length]) for example in together]
    assert encode([], world_tokenizer, system) == []


def test_the_end_of_sequence_pads_where_there_is_no_padding_token(
    byte_tokenizer: PreTrainedTokenizerFast, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert byte_tokenizer.pad_token_id is None
    assert pad_token(byte_tokenizer) == byte_tokenizer.eos_token_id
    assert pad_token(world_tokenizer) == world_tokenizer.pad_token_id != world_tokenizer.eos_token_id
