"""Greedy decoding with a static cache is transformers' own greedy decoding, for every backbone, compiled or not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny_models import FAMILIES, aligned, base_model, low_rank_experts, padded, random_rows
from torch import Tensor
from transformers import PreTrainedModel

from alignx_ds.evaluation.decode import CHECK_EVERY, CapturedStep, Decoder

PAD, END = 0, 3
LIMIT = CHECK_EVERY + 4


def expected(model: PreTrainedModel, ids: Tensor, mask: Tensor, ends: list[int]) -> Tensor:
    """Padded to the limit, as transformers stops when the last row has ended."""
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=LIMIT, do_sample=False, pad_token_id=PAD, eos_token_id=ends or None
    )[:, ids.shape[1] :]
    return torch.nn.functional.pad(made, (0, LIMIT - made.shape[1]), value=PAD)


def model_of(family: str) -> PreTrainedModel:
    base = base_model(family=family)
    return aligned(base, low_rank_experts(base))


FIVE = [5, 9, 2, 7, 1]


@pytest.mark.parametrize(("family", "lengths"), [("llama", [5]), ("llama", [4, 9]), *((f, FIVE) for f in FAMILIES)])
def test_answers_are_those_of_transformers(family: str, lengths: list[int]) -> None:
    """One and two rows decode with factors of their own, five with all experts' stacked."""
    model = model_of(family)
    ids, mask = padded(random_rows(lengths, seed=4), "left")
    for ends in ([], [END], [END, 17, 20]):
        assert torch.equal(Decoder(model).greedy(ids, mask, LIMIT, ends, PAD), expected(model, ids, mask, ends))


def test_a_plain_model_is_decoded_too() -> None:
    model = base_model()
    ids, mask = padded(random_rows([5, 9, 2]), "left")
    assert torch.equal(Decoder(model).greedy(ids, mask, LIMIT, [END], PAD), expected(model, ids, mask, [END]))


def test_nothing_follows_an_end_and_the_steps_stop_when_all_rows_have_ended() -> None:
    model = model_of("llama")
    ids, mask = padded(random_rows([5, 9, 2]), "left")
    free = Decoder(model).greedy(ids, mask, LIMIT, [], PAD)
    ends = sorted({int(row[1]) for row in free})  # every row ends at its second token, or at its first
    decoder = Decoder(model)
    steps: list[int] = []
    step = decoder.step
    decoder.step = lambda *args: (steps.append(1), step(*args))[1]  # type: ignore[func-returns-value]
    made = decoder.greedy(ids, mask, 4 * CHECK_EVERY, ends, PAD)
    assert not made[:, 2:].any()
    assert len(steps) == CHECK_EVERY - 1


def test_a_limit_of_one_token_needs_no_step() -> None:
    model = model_of("llama")
    ids, mask = padded(random_rows([5, 9]), "left")
    decoder = Decoder(model)
    decoder.step = lambda *args: pytest.fail("a step was made")
    assert torch.equal(decoder.greedy(ids, mask, 1, [], PAD), expected(model, ids, mask, [])[:, :1])


@pytest.mark.parametrize("captured", [False, True])
def test_a_decoder_does_not_keep_its_model(captured: bool) -> None:
    """A run answers with a dozen models, one after the other; memory can't wait for Python's garbage collector."""
    model = model_of("llama")
    decoder = Decoder(model)
    if captured:
        decoder.step = CapturedStep(decoder.step)
        decoder.step.disabled = True
    ids, mask = padded(random_rows([5, 9]), "left")
    gc.disable()
    try:
        decoder.greedy(ids, mask, 4, [END], PAD)
        left = weakref.ref(model)
        del model, decoder
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.timeout(600)
def test_a_compiled_step_is_one_graph_with_the_same_answers() -> None:
    """With `fullgraph`, anything that breaks the graph raises, such as reading a value from the device."""
    model = model_of("llama")
    ids, mask = padded(random_rows([5, 9, 2, 7], seed=4), "left")
    plain, compiled = (Decoder(model, compiled=c).greedy(ids, mask, 6, [END], PAD) for c in (False, True))
    assert torch.equal(plain, compiled)
