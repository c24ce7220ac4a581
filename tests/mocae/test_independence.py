"""A row's logits and its routing depend on nothing but the row (invariant 4)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import (
    ALIGNX_LAYERS,
    DENSE,
    MIXTURES,
    aligned,
    base_model,
    low_rank_experts,
    padded,
    random_rows,
    relative,
)
from torch import Tensor

from alignx_ds.mocae.modeling import AlignXForCausalLM, Placement

MODELS = [
    ("fused", "shared", 1, False),
    ("fused", "per_layer", 2, False),
    ("fused", "per_layer", 1, True),
    ("parallel", "shared", 1, False),
    ("parallel", "per_layer", 2, False),
    ("parallel", "shared", 1, True),
    ("fused", "per_layer", 0, False, "outputs"),
    ("fused", "shared", 0, False, "weights"),
    ("parallel", "shared", 0, True, "outputs"),
]
OTHERS = [("fused", "shared", 1, False), ("parallel", "per_layer", 2, False)]
CASES = [("llama", *m) for m in MODELS] + [(f, *OTHERS[i % 2]) for i, f in enumerate(DENSE) if f != "llama"]
CASES += [(f, *OTHERS[0]) for f in MIXTURES]


@pytest.fixture(scope="module", params=CASES, ids=lambda m: "-".join(map(str, m)))
def model(request: pytest.FixtureRequest) -> AlignXForCausalLM:
    family, path, scope, top_k, training, *needs = request.param
    base, placement = base_model(family=family), Placement(1, 0) if path == "parallel" else None
    gate = {"scope": scope, "top_k": top_k, **({"kind": "needs", "combine": needs[0]} if needs else {})}
    made = aligned(base, low_rank_experts(base), **gate, placement=placement)
    return made.train(training)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[int], str, int]:
    """Rows, how many of each one's tokens are the prompt, the padding's side, and superfluous columns of it."""
    lengths = draw(st.lists(st.integers(2, 14), min_size=1, max_size=5))
    rows = random_rows(lengths, seed=draw(st.integers(0, 10_000)))
    prompts = [draw(st.integers(1, n)) for n in lengths]
    return rows, prompts, draw(st.sampled_from(["left", "right"])), draw(st.integers(0, 4))


def prompt_mask_of(prompts: list[int], mask: Tensor) -> Tensor:
    return ((mask.cumsum(-1) <= torch.tensor(prompts).unsqueeze(-1)) * mask).long()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=batches(), use_cache=st.booleans())
@torch.no_grad()
def test_a_row_alone_is_a_row_in_any_batch(
    model: AlignXForCausalLM, batch: tuple[list[list[int]], list[int], str, int], use_cache: bool
) -> None:
    rows, prompts, side, extra = batch
    ids, mask = padded(rows, side, extra)
    together = model(ids, mask, prompt_mask_of(prompts, mask), use_cache=use_cache).logits
    decided = dict(model.routing.decisions)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        alone = torch.tensor([row])
        asked = (torch.arange(len(row)) < prompt).long().unsqueeze(0)
        expected = model(alone, torch.ones_like(alone), asked, use_cache=False).logits[0]
        assert relative(together[i][mask[i].bool()], expected) < 1e-5
        for layer, decision in model.routing.decisions.items():
            assert relative(decided[layer].logits[i], decision.logits[0]) < 1e-5
            assert torch.allclose(decided[layer].gates[i], decision.gates[0], atol=1e-5)


@torch.no_grad()
def test_the_rows_are_routed_apart(model: AlignXForCausalLM) -> None:
    """Otherwise the test above would pass for any routing."""
    ids, mask = padded(random_rows([9] * 12))
    model(ids, mask)
    first = model.routing.decisions[ALIGNX_LAYERS[0]]
    assert len(set(first.logits.argmax(-1).tolist())) > 1


@torch.no_grad()
def test_the_routing_ignores_the_answer_and_the_padding(model: AlignXForCausalLM) -> None:
    prompt, *answers = random_rows([6, 4, 5])
    logits = []
    for answer in answers:
        ids, mask = padded([prompt + answer], extra=3)
        ids[mask == 0] = answer[0]  # whatever stands in the padding
        model(ids, mask, prompt_mask_of([6], mask))
        logits.append(model.routing.decisions[ALIGNX_LAYERS[0]].logits)
    assert relative(logits[1], logits[0]) < 1e-5
    ids, mask = padded([prompt + answers[0]])
    model(ids, mask)  # the answer counted as prompt: another query
    assert relative(model.routing.decisions[ALIGNX_LAYERS[0]].logits, logits[0]) > 1e-3


@torch.no_grad()
def test_a_mask_left_out_is_a_row_without_padding(model: AlignXForCausalLM) -> None:
    ids = torch.tensor(random_rows([7, 7]))
    assert torch.equal(model(ids).logits, model(ids, torch.ones_like(ids), torch.ones_like(ids)).logits)


@torch.no_grad()
def test_without_a_prompt_mask_the_unpadded_input_is_the_prompt(model: AlignXForCausalLM) -> None:
    ids, mask = padded(random_rows([7, 4]), "left")
    assert torch.equal(model(ids, mask).logits, model(ids, mask, mask).logits)
