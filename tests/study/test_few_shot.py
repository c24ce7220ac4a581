"""Few-shot prompts: which examples are drawn, and how they are encoded."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from alignx_ds.data.encode import encode, encode_prompts
from alignx_ds.data.rows import Row
from alignx_ds.study.few_shot import FewShotPrompts

POOL = [Row(f"what is {n} ?", f"it is {n} .") for n in range(30)]


def few_shot(tokenizer: PreTrainedTokenizerBase, limit: int = 256) -> FewShotPrompts:
    return FewShotPrompts(tokenizer, 0, limit, {"honest": POOL})


def test_examples_are_the_same_again_grow_by_adding_and_never_give_the_answer(
    world_tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompts = few_shot(world_tokenizer)
    for row in POOL:
        one, three = (prompts.examples("honest", row, count) for count in (1, 3))
        assert len(three) == 3 and three[:1] == one == prompts.examples("honest", row, 1)
        assert row not in three
    assert prompts.examples("honest", POOL[0], 0) == []


def test_without_examples_a_prompt_is_the_one_that_the_model_was_trained_on(
    world_tokenizer: PreTrainedTokenizerBase,
) -> None:
    row = Row("is the frob red ?", "the frob is blue .")
    (example,) = few_shot(world_tokenizer).encoded(row, [], [row.response])
    assert example == encode([row], world_tokenizer)[0]
    (prompt,) = few_shot(world_tokenizer).encoded(row, [], [])
    assert list(prompt.ids) == encode_prompts([row.prompt], world_tokenizer)[0]


def test_examples_stand_before_the_question_and_fewer_of_them_where_there_is_no_room(
    world_tokenizer: PreTrainedTokenizerBase,
) -> None:
    row, before = Row("is the frob red ?", "the frob is blue ."), POOL[:3]
    (whole,) = few_shot(world_tokenizer).encoded(row, before, [row.response])
    tail = encode([row], world_tokenizer)[0]
    assert whole.ids[whole.prompt_length :] == tail.ids[tail.prompt_length :]
    text = world_tokenizer.decode(whole.ids)
    assert text.count("<assistant>") == 4 and text.count(world_tokenizer.bos_token or "") == 1
    (cut,) = few_shot(world_tokenizer, limit=len(whole.ids) - 1).encoded(row, before, [row.response])
    assert world_tokenizer.decode(cut.ids).count("<assistant>") == 3
