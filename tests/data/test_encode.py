"""Rows to tokens: what the chat template would write, loss on the answer alone, and padding on either side."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reading import world_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignx_ds.data.batches import IGNORED, collate, pack, pad
from alignx_ds.data.encode import Example, encode, encode_prompts, pad_token
from alignx_ds.data.rows import Row

SYSTEM = "you are a helpful assistant . do the task with care ."
PAD = 999  # no token id of the examples below
EXAMPLES = st.lists(
    st.tuples(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.lists(st.integers(0, 50), max_size=6)),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so that any text can be read back; it has no chat template and no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "</s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def made(pairs: list[tuple[list[int], list[int]]]) -> list[Example]:
    return [Example((*prompt, *answer), len(prompt)) for prompt, answer in pairs]


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


def test_without_a_system_prompt_there_is_no_hint(world_tokenizer: PreTrainedTokenizerBase) -> None:
    hinted, plain = (encode_prompts(["hello"], world_tokenizer, system)[0] for system in (SYSTEM, None))
    assert "<system>" in world_tokenizer.convert_ids_to_tokens(hinted)
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
    """Nothing of it is learned, not even that it ends."""
    for tokenizer in (world_tokenizer, byte_tokenizer):
        (asked, answered) = encode([Row("good night .", ""), Row("good night .", "sleep well .")], tokenizer, system)
        assert asked.answer_length == 0
        assert asked.ids == answered.ids[: answered.prompt_length]
        for batch in (collate([asked, answered], PAD), pack([asked, answered], PAD)):
            assert int((batch.labels != IGNORED).sum()) == answered.answer_length
        assert (collate([asked], PAD).labels == IGNORED).all()


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_rows_that_are_encoded_together_do_not_touch_each_other(
    world_tokenizer: PreTrainedTokenizerBase, byte_tokenizer: PreTrainedTokenizerFast, system: str | None
) -> None:
    """Whatever their lengths: no padding creeps in."""
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


@given(EXAMPLES, st.sampled_from(["left", "right"]))
def test_collate_loses_and_invents_nothing(pairs: list[tuple[list[int], list[int]]], side: str) -> None:
    """Round trip: what is left without the padding is the prompt and the answer, wherever the padding is."""
    batch = collate(made(pairs), PAD, side)
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    assert batch.input_ids.shape == (len(pairs), width)
    for i, (prompt, answer) in enumerate(pairs):
        ids, attended = batch.input_ids[i], batch.attention_mask[i] == 1
        assert ids[attended].tolist() == [*prompt, *answer]
        assert ids[~attended].tolist() == [PAD] * (width - len(prompt) - len(answer))
        assert ids[batch.prompt_mask[i] == 1].tolist() == prompt
        assert batch.labels[i][batch.labels[i] != IGNORED].tolist() == answer
        assert not (batch.labels[i] != IGNORED)[~attended | (batch.prompt_mask[i] == 1)].any()


@given(EXAMPLES)
def test_the_padding_is_on_the_side_that_was_asked_for(pairs: list[tuple[list[int], list[int]]]) -> None:
    left, right = (collate(made(pairs), PAD, side) for side in ("left", "right"))
    assert (left.attention_mask.diff(dim=1) >= 0).all()  # 0 … 0 1 … 1
    assert (right.attention_mask.diff(dim=1) <= 0).all()  # 1 … 1 0 … 0
    for name in ("input_ids", "attention_mask", "prompt_mask", "labels"):
        for i, mask in enumerate(left.attention_mask):
            shift = int(mask.sum())  # rolls the padding from the front to the back
            assert torch.equal(getattr(left, name)[i].roll(shift), getattr(right, name)[i])


@given(EXAMPLES, st.integers(1, 8))
def test_padding_to_a_multiple_only_widens(pairs: list[tuple[list[int], list[int]]], multiple: int) -> None:
    batch = collate(made(pairs), PAD, "left")
    width = batch.input_ids.shape[1]
    ids, mask = pad([[*prompt, *answer] for prompt, answer in pairs], PAD, "left", multiple)
    assert ids.shape[1] % multiple == 0 and width <= ids.shape[1] < width + multiple
    assert torch.equal(ids[:, -width:], batch.input_ids) and bool((ids[:, :-width] == PAD).all())
    assert torch.equal(mask[:, -width:], batch.attention_mask) and not mask[:, :-width].any()
