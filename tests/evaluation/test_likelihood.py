"""Likelihoods against a plain loop over single rows, and the measures made of them against their definitions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from scipy.special import log_softmax, softmax
from tiny_models import aligned, base_model, low_rank_experts, random_rows
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.data.encode import Example, encode, pad_token
from alignx_ds.data.rows import Row
from alignx_ds.evaluation.likelihood import MEASURES, Likelihood, likelihoods, multiple_choice, perplexity, preference
from alignx_ds.mocae.layer import gates_of
from alignx_ds.training import losses

PROMPTS = [4, 2, 6, 3, 1, 5, 7]
EXAMPLES = [Example(tuple(ids), n) for ids, n in zip(random_rows([9, 5, 14, 7, 6, 12, 8], 61), PROMPTS, strict=True)]
MAKE: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": base_model,
    "gemma": lambda: base_model(family="gemma"),
    "aligned": lambda: aligned(base_model(), low_rank_experts(base_model())),
    "aligned per layer": lambda: aligned(base_model(), low_rank_experts(base_model()), scope="per_layer", top_k=2),
}
QUESTIONS = [
    Row("what is a dog ?", "an animal .", correct=("an animal .", "a pet ."), incorrect=("a plant .", "red .")),
    Row("who are you ?", "a model .", correct=("a model .",), incorrect=("a dog .", "i do not know .", "the net .")),
    Row("where is the cat ?", "here .", correct=("here .", "there ."), incorrect=("in the red house .",)),
]
PAIRS = [
    Row("what is a dog ?", "an animal .", rejected="a plant , and red ."),
    Row("who are you ?", "a model .", rejected="a dog ."),
]


@torch.no_grad()
def one_by_one(model: PreTrainedModel, example: Example) -> float:
    """The sum over the answer's tokens, of one row alone. An aligned model also gets the prompt mask."""
    routed = {}
    if model.config.model_type == "alignx":
        routed["prompt_mask"] = torch.tensor([[1] * example.prompt_length + [0] * example.answer_length])
    logits = model(input_ids=torch.tensor([example.ids]), **routed).logits[0].double().numpy()
    log_p = log_softmax(logits, axis=-1)
    return float(sum(log_p[t - 1, example.ids[t]] for t in range(example.prompt_length, len(example.ids))))


@pytest.mark.parametrize(("kind", "batch"), [("aligned", 1), ("aligned", 100), *((kind, 3) for kind in MAKE)])
def test_likelihoods_are_those_of_single_rows_at_any_batch_size(kind: str, batch: int) -> None:
    model = MAKE[kind]().train()  # as a fine-tune leaves it
    found = likelihoods(model, EXAMPLES, 0, batch)
    assert not model.training
    assert [f.tokens for f in found] == [e.answer_length for e in EXAMPLES]
    assert [f.log_probability for f in found] == pytest.approx([one_by_one(model, e) for e in EXAMPLES], rel=1e-4)


@pytest.mark.parametrize("kind", MAKE)
def test_with_many_logits_the_head_computes_those_of_answers_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piece by piece, so that a large batch or vocabulary does not need a logit for every token."""
    model, examples = MAKE[kind](), EXAMPLES
    whole = likelihoods(model, examples, 0, 4)
    widths: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: widths.append(logits.shape[-2]))
    monkeypatch.setattr(losses, "MOST_LOGITS", 2 * head.out_features)
    in_pieces = likelihoods(model, examples, 0, 4)
    assert sum(widths) == sum(example.answer_length for example in examples)
    assert [a.tokens for a in in_pieces] == [a.tokens for a in whole]
    for a, b in zip(in_pieces, whole, strict=True):
        assert a.log_probability == pytest.approx(b.log_probability, rel=1e-6)


def test_neither_order_nor_the_padding_token_matters() -> None:
    model, shuffled = MAKE["aligned"](), list(range(len(EXAMPLES)))
    random.Random(0).shuffle(shuffled)
    expected = likelihoods(model, EXAMPLES, 0, 3)
    found = likelihoods(model, [EXAMPLES[i] for i in shuffled], 49, 4)
    assert [f.tokens for f in found] == [expected[i].tokens for i in shuffled]
    by_row = [expected[i].log_probability for i in shuffled]
    assert [f.log_probability for f in found] == pytest.approx(by_row, rel=1e-4)


def test_no_rows_have_no_likelihoods() -> None:
    assert likelihoods(base_model(), [], 0, 3) == []


def test_a_bf16_models_likelihoods_are_summed_in_full_precision() -> None:
    model = base_model()
    exact = likelihoods(model, EXAMPLES, 0, 3)
    rounded = likelihoods(model.to(torch.bfloat16), EXAMPLES, 0, 3)
    for e, r in zip(exact, rounded, strict=True):
        assert r.per_token == pytest.approx(e.per_token, rel=0.1)
        assert r.log_probability != float(torch.tensor(r.log_probability).bfloat16())


def test_an_aligned_model_routes_by_the_prompt_alone_as_in_generation() -> None:
    """The decision equals that of `generate` on the prompt, for every answer and beside rows of any length."""
    model = MAKE["aligned per layer"]()
    prompt = EXAMPLES[0].ids[:4]
    answers = [tuple(ids) for ids in random_rows([1, 9, 3], 62)]
    model.generate(torch.tensor([prompt]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    alone = {layer: d.logits[0] for layer, d in model.routing.decisions.items()}
    likelihoods(model, [Example((*prompt, *answer), len(prompt)) for answer in answers], 0, 3)
    assert set(alone) == set(gates_of(model))
    for layer, decision in model.routing.decisions.items():
        for logits in decision.logits:
            torch.testing.assert_close(logits, alone[layer], rtol=1e-4, atol=1e-4)
    model(input_ids=torch.tensor([(*prompt, *answers[1])]))  # the whole row as prompt: that would be another decision
    assert any((d.logits[0] - alone[i]).abs().max() > 1e-2 for i, d in model.routing.decisions.items())


def test_perplexity_weighs_every_token_alike() -> None:
    answers = [Likelihood(-6.0, 3), Likelihood(-1.0, 1), Likelihood(-1.0, 4)]
    assert perplexity(answers) == pytest.approx(math.exp(8.0 / 8))
    assert perplexity([Likelihood(-5 * math.log(50), 5)]) == pytest.approx(50.0), "of a uniform guess among 50 tokens"


def test_perplexity_is_that_of_transformers_own_loss(tiny: PreTrainedModel) -> None:
    example = EXAMPLES[2]
    labels = torch.tensor([[-100] * example.prompt_length + list(example.ids[example.prompt_length :])])
    loss = tiny(input_ids=torch.tensor([example.ids]), labels=labels).loss
    assert perplexity(likelihoods(tiny, [example], 0, 1)) == pytest.approx(float(torch.exp(loss.detach())), rel=1e-4)


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    return base_model()


@pytest.fixture
def speaker(world_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A random model that reads the world's tokens."""
    return base_model(vocab_size=len(world_tokenizer))


def log_p(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> float:
    (example,) = encode([Row(prompt, answer)], tokenizer)
    return one_by_one(model, example)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_multiple_choice_is_its_definition(
    speaker: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase, batch: int
) -> None:
    first, second = [], []
    for row in QUESTIONS:
        correct, wrong = (
            [log_p(speaker, world_tokenizer, row.prompt, a) for a in answers]
            for answers in (row.correct, row.incorrect)
        )
        first.append(log_p(speaker, world_tokenizer, row.prompt, row.response) > max(wrong))
        second.append(softmax([*correct, *wrong])[: len(correct)].sum())
    found = multiple_choice(speaker, world_tokenizer, QUESTIONS, batch)
    assert found["mc1"] == pytest.approx(100 * sum(first) / 3)
    assert found["mc2"] == found["score"] == pytest.approx(100 * sum(second) / 3, rel=1e-4)
    assert found["questions"] == 3
    assert 0 < found["mc1"] < 100, "otherwise the rows test nothing"


def test_mc1_asks_for_the_best_answer_and_mc2_for_all(
    speaker: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    """An easy second correct answer helps MC2 and not MC1; order within the sets never matters."""
    row = QUESTIONS[0]
    short = Row(row.prompt, row.response, correct=(row.response, "a"), incorrect=row.incorrect)
    turned = Row(row.prompt, row.response, correct=short.correct[::-1], incorrect=row.incorrect[::-1])
    alone = Row(row.prompt, row.response, correct=(row.response,), incorrect=row.incorrect)
    one, two, three = (multiple_choice(speaker, world_tokenizer, [r], 8) for r in (alone, short, turned))
    assert one["mc1"] == two["mc1"] == three["mc1"]
    assert two["mc2"] > one["mc2"]
    assert two["mc2"] == pytest.approx(three["mc2"], rel=1e-4)


@torch.no_grad()
def biased(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, word: str, logit: float) -> PreTrainedModel:
    """A model whose logit of `word` has this bias after any text; all other tokens are equally likely."""
    model.lm_head.weight.zero_()
    (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    hook = torch.zeros(model.config.vocab_size)
    hook[token] = logit
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + hook)
    return model


@pytest.mark.parametrize(("logit", "expected"), [(30.0, 100.0), (-30.0, 0.0)])
def test_a_model_that_prefers_the_right_word_scores_a_hundred(
    speaker: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase, logit: float, expected: float
) -> None:
    model = biased(speaker, world_tokenizer, "dog", logit)
    rows = [Row(p, "dog", correct=("dog", "dog dog"), incorrect=("cat", "red")) for p in ("who ?", "what ?")]
    found = multiple_choice(model, world_tokenizer, rows, 3)
    assert found["mc1"] == expected
    assert found["mc2"] == pytest.approx(expected, abs=1e-4)
    pairs = [Row("who ?", "dog", rejected="cat"), Row("who ?", "dog dog", rejected="cat red")]
    assert preference(model, world_tokenizer, pairs, 3)["score"] == expected


def test_answers_that_are_as_likely_are_not_preferred(
    speaker: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = biased(speaker, world_tokenizer, "dog", 0.0)
    rows = [Row("who ?", "dog", correct=("dog",), incorrect=("cat", "red"))]
    assert multiple_choice(model, world_tokenizer, rows, 3)["mc1"] == 0
    assert multiple_choice(model, world_tokenizer, rows, 3)["mc2"] == pytest.approx(100 / 3)
    assert preference(model, world_tokenizer, [Row("who ?", "dog", rejected="cat")], 3)["score"] == 0


def test_a_long_answer_may_be_likelier_per_token_only(
    speaker: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Three liked words and the end, against one other and the end: unlikelier as a whole, likelier word by word."""
    model = biased(speaker, world_tokenizer, "dog", 1.0)
    normaliser = math.log(len(world_tokenizer) - 1 + math.exp(1.0))
    liked, other = 3 * 1.0 - 4 * normaliser, -2 * normaliser
    assert liked < other and liked / 4 > other / 2
    found = preference(model, world_tokenizer, [Row("who ?", "dog dog dog", rejected="cat")], 3)
    assert (found["score"], found["per_token"], found["in_total"]) == (100, 100, 0)


def test_preference_is_its_definition(speaker: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase) -> None:
    total, per_token = [], []
    for row in PAIRS:
        sums = [log_p(speaker, world_tokenizer, row.prompt, a) for a in (row.response, row.rejected)]
        lengths = [e.answer_length for e in encode([Row("", row.response), Row("", row.rejected)], world_tokenizer)]
        total.append(sums[0] > sums[1])
        per_token.append(sums[0] / lengths[0] > sums[1] / lengths[1])
    found = preference(speaker, world_tokenizer, PAIRS, 2)
    assert found["in_total"] == 100 * sum(total) / 2
    assert found["per_token"] == 100 * sum(per_token) / 2
    assert found["pairs"] == 2


@pytest.mark.parametrize("measure", MEASURES)
def test_rows_without_choices_are_left_out(
    speaker: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase, measure: str
) -> None:
    plain = [Row("who ?", "dog")]
    assert not any(MEASURES[measure](speaker, world_tokenizer, plain, 3).values())
    whole = QUESTIONS if measure == "mc" else PAIRS
    found = MEASURES[measure](speaker, world_tokenizer, [*plain, *whole, *plain], 3)
    assert found == pytest.approx(MEASURES[measure](speaker, world_tokenizer, whole, 3), rel=1e-4)


def test_the_closing_token_belongs_to_the_answer(
    speaker: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    (example,) = encode([Row("who ?", "dog")], world_tokenizer)
    assert example.ids[-1] == world_tokenizer.eos_token_id
    (found,) = likelihoods(speaker, [example], pad_token(world_tokenizer), 1)
    assert found.tokens == 2
