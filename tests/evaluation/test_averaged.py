"""Decoding with several models: each token is the likeliest by the mean of the logits, or of the probabilities."""

from __future__ import annotations

import pytest
import torch
from tiny_models import base_model, padded, random_rows

from alignx_ds.evaluation.averaged import MEANS, AveragedDecoder, Mean
from alignx_ds.evaluation.decode import Decoder

PAD, END, LIMIT = 0, 3, 12
FAMILIES = ("llama", "mistral", "qwen2")  # models of one vocabulary, with different attention


@torch.no_grad()
def directly(ids: list[int], mean: Mean) -> list[int]:
    """One prompt without padding, batch or cache, every token from the whole text before it."""
    models, text = [base_model(seed, family=family) for seed, family in enumerate(FAMILIES)], list(ids)
    while len(text) < len(ids) + LIMIT and text[-1] != END:
        logits = [model(torch.tensor([text])).logits[0, -1].double() for model in models]
        if mean == "logits":
            score = logits[0] + logits[1] + logits[2]
        else:
            score = sum((one.exp() / one.exp().sum() for one in logits), torch.zeros(1))
        text.append(int(score.argmax()))
    answer = text[len(ids) :]
    return answer + [PAD] * (LIMIT - len(answer))


@pytest.mark.parametrize("mean", MEANS)
def test_answers_are_those_of_a_direct_computation(mean: Mean) -> None:
    rows = random_rows([5, 9, 4, 7], seed=2)
    ids, mask = padded(rows, "left")
    models = [base_model(seed, family=family) for seed, family in enumerate(FAMILIES)]
    made = AveragedDecoder(models, mean).greedy(ids, mask, LIMIT, [END], PAD)
    assert made.tolist() == [directly(list(row), mean) for row in rows]
    assert not any(torch.equal(made, Decoder(model).greedy(ids, mask, LIMIT, [END], PAD)) for model in models)


def test_a_model_that_rules_a_token_out_has_a_veto_only_with_logits() -> None:
    logits = torch.tensor([[[9.0, 0.0, 5.0]], [[-20.0, 0.0, 0.0]]])  # two models, one row
    assert MEANS["logits"](logits).argmax(-1).item() == 2
    assert MEANS["probabilities"](logits).argmax(-1).item() == 0
