"""Rows of a running batch: each has the tokens that it would have alone, whoever joins and leaves beside it."""

from __future__ import annotations

from random import Random

import pytest
import torch
from tiny_models import (
    FAMILIES,
    MIXTURES,
    aligned,
    attention_experts,
    base_model,
    low_rank_experts,
    random_rows,
    relative,
)
from torch import Tensor
from transformers import PreTrainedModel

from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.mocae.serving import gates_of_needs
from alignx_ds.serve.slots import Slots

PROMPTS = random_rows([5, 9, 3, 12, 7, 1, 4, 8])
NEEDS = [None, [0.5, 0.5, 0.0], None, [0.0, 1.0, 0.0], None, None, [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
TOKENS = 6


def alone(model: PreTrainedModel, prompt: list[int], needs: list[float] | None) -> list[Tensor]:
    """The logits of greedy tokens, by one full forward pass for each."""
    ids, found, given = list(prompt), [], {}
    for _ in range(TOKENS):
        if isinstance(model, AlignXForCausalLM):
            given["prompt_mask"] = torch.tensor([[int(place < len(prompt)) for place in range(len(ids))]])
            if needs is not None:
                given["forced"] = gates_of_needs(torch.tensor([needs]))
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([ids]), use_cache=False, **given).logits[0, -1])
        ids.append(int(found[-1].argmax()))
    return found


def together(model: PreTrainedModel, needs: list[list[float] | None], seed: int) -> list[list[Tensor]]:
    """The same in five slots, which prompts join and leave at random steps."""
    slots, chance = Slots(model, 5, 40), Random(seed)
    waiting, running = list(range(len(PROMPTS))), []
    found: list[list[Tensor]] = [[] for _ in PROMPTS]
    while waiting or running:
        while waiting and len(running) < 5 and (not running or chance.random() < 0.6):
            prompt = waiting.pop(0)
            read = slots.prefill(PROMPTS[prompt], needs[prompt])
            slots.add(read)
            found[prompt].append(read.logits[0])
            running.append(prompt)
        for prompt, logits in zip(running, slots.step([int(found[p][-1].argmax()) for p in running]), strict=True):
            found[prompt].append(logits)
        for row in reversed(range(len(running))):
            if len(found[running[row]]) == TOKENS:
                slots.remove(row)
                running[row] = running[-1]
                running.pop()
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["dense", "choice, shared, outputs", "needs, per_layer, weights"])
def test_a_row_s_tokens_do_not_depend_on_the_batch(family: str, kind: str) -> None:
    """Also with attention windows, which are shorter than most rows, and with forced needs beside the gates' own."""
    model, needs = base_model(family=family), NEEDS
    if kind == "dense":
        needs = [None] * len(PROMPTS)
    else:
        names = dict(zip(("kind", "scope", "combine"), kind.split(", "), strict=True))
        names["scope"] = "shared" if family in MIXTURES else names["scope"]
        experts = attention_experts(model) if names["scope"] == "shared" else low_rank_experts(model)
        model = aligned(model, experts, **names)
    expected = [alone(model, *one) for one in zip(PROMPTS, needs, strict=True)]
    found = together(model, needs, seed=len(family))
    for own, others in zip(expected, found, strict=True):
        assert [int(logits.argmax()) for logits in own] == [int(logits.argmax()) for logits in others]
        assert relative(torch.stack(others), torch.stack(own)) < 1e-5
