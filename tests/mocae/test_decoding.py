"""Prefill and decoding with the KV cache equal one full forward pass (invariant 5), and so does generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import (
    DENSE,
    MIXTURES,
    aligned,
    attention_experts,
    base_model,
    low_rank_experts,
    padded,
    random_rows,
    relative,
)

from alignx_ds.mocae import modeling
from alignx_ds.mocae.kv_cache import ARGUMENT, kv_cache
from alignx_ds.mocae.modeling import AlignXForCausalLM, Placement

MODELS = [("fused", "shared", 1), ("fused", "per_layer", 2), ("parallel", "shared", 1), ("parallel", "per_layer", 4)]
NEEDS = [("fused", "per_layer", 0, "needs", "outputs"), ("fused", "shared", 0, "needs", "weights")]
NEEDS += [("fused", "shared", 1, "needs", "outputs"), ("parallel", "shared", 0, "needs", "outputs")]
CHOICE = ("choice", "outputs")
CASES = [("llama", *m, *CHOICE) for m in MODELS] + [("llama", *m) for m in NEEDS]
CASES += [(f, *MODELS[i % 2], *CHOICE) for i, f in enumerate(DENSE) if f != "llama"]
CASES += [(f, *MODELS[0], *CHOICE) for f in MIXTURES]
PROMPTS = random_rows([5, 9, 2, 7, 1], seed=4)


@pytest.fixture(scope="module", params=CASES, ids=lambda m: "-".join(map(str, m)))
def model(request: pytest.FixtureRequest) -> AlignXForCausalLM:
    family, path, scope, top_k, kind, combine = request.param
    base, placement = base_model(family=family), Placement(1, 0) if path == "parallel" else None
    gate = {"scope": scope, "top_k": top_k, "kind": kind, "combine": combine}
    experts = attention_experts(base) if scope == "shared" else low_rank_experts(base)
    return aligned(base, experts, **gate, placement=placement)


@pytest.mark.parametrize("chunk", [1, 3])
@torch.no_grad()
def test_prefill_then_decode_is_one_full_forward(model: AlignXForCausalLM, chunk: int) -> None:
    prompts, answers = random_rows([5, 9, 2], seed=1), torch.tensor(random_rows([6, 6, 6], seed=2))
    ids, mask = padded(prompts, "left")
    full_ids, full_mask = torch.cat([ids, answers], 1), torch.cat([mask, torch.ones_like(answers)], 1)
    asked = torch.cat([mask, torch.zeros_like(answers)], 1)
    expected = model(full_ids, full_mask, asked, use_cache=False).logits

    out = model(ids, mask, use_cache=True)
    decisions, logits = kv_cache(out).routing.decisions, [out.logits]
    for start in range(0, 6, chunk):
        seen = full_mask[:, : ids.shape[1] + start + chunk]
        out = model(answers[:, start : start + chunk], seen, use_cache=True, **{ARGUMENT: kv_cache(out)})
        assert kv_cache(out).routing.decisions is decisions  # decided once, at prefill
        logits.append(out.logits)
    assert relative(torch.cat(logits, 1)[full_mask.bool()], expected[full_mask.bool()]) < 1e-5
    rerouted = model(full_ids, full_mask, use_cache=False).logits  # the answer counted as prompt
    assert relative(rerouted[full_mask.bool()], expected[full_mask.bool()]) > 1e-3


@torch.no_grad()
def test_decoding_needs_no_mask_where_nothing_is_padded(model: AlignXForCausalLM) -> None:
    ids = torch.tensor(random_rows([9, 9], seed=3))
    asked = (torch.arange(9) < 6).long().expand(2, -1)
    expected = model(ids, torch.ones_like(ids), asked, use_cache=False).logits
    prefill = model(ids[:, :6], use_cache=True)
    decoded = model(ids[:, 6:], use_cache=True, **{ARGUMENT: kv_cache(prefill)})
    assert relative(torch.cat([prefill.logits, decoded.logits], 1), expected) < 1e-5


@torch.no_grad()
def stepwise(model: AlignXForCausalLM, prompt: list[int], count: int) -> list[int]:
    """The argmax of full forward passes over the row alone."""
    row = list(prompt)
    for _ in range(count):
        ids = torch.tensor([row])
        asked = (torch.arange(len(row)) < len(prompt)).long().unsqueeze(0)
        row.append(int(model(ids, torch.ones_like(ids), asked, use_cache=False).logits[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.fixture(scope="module")
def answers(model: AlignXForCausalLM) -> list[list[int]]:
    """To PROMPTS."""
    return [stepwise(model, prompt, 7) for prompt in PROMPTS]


def test_greedy_generation_is_the_stepwise_argmax(model: AlignXForCausalLM, answers: list[list[int]]) -> None:
    """Of rows of several lengths, of one row, and of rows of one length."""
    equal = random_rows([6, 6, 6], seed=4)
    cases = [(PROMPTS, answers), (PROMPTS[:1], answers[:1]), (equal, [stepwise(model, p, 7) for p in equal])]
    for prompts, expected in cases:
        ids, mask = padded(prompts, "left")
        made = model.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=0)
        assert made[:, ids.shape[1] :].tolist() == expected


def test_a_row_that_ends_early_leaves_the_others_alone(model: AlignXForCausalLM, answers: list[list[int]]) -> None:
    end = answers[0][1]
    ids, mask = padded(PROMPTS, "left")
    made = model.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=end)
    for row, full in zip(made[:, ids.shape[1] :].tolist(), answers, strict=True):
        length = full.index(end) + 1 if end in full else 7
        assert row[:length] == full[:length]
        assert all(token == 0 for token in row[length:])


def test_two_generations_share_no_decision(model: AlignXForCausalLM) -> None:
    """A model keeps nothing from one call to the next."""
    first, second = (padded(random_rows([6, 3], seed=s), "left") for s in (5, 6))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(second[0], attention_mask=second[1], **settings)
    model.generate(first[0], attention_mask=first[1], **settings)
    assert torch.equal(model.generate(second[0], attention_mask=second[1], **settings), alone)


def test_generation_without_the_cache_is_generation_with_it(model: AlignXForCausalLM) -> None:
    """What has been generated never counts as prompt."""
    ids, mask = padded(PROMPTS, "left")
    settings = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    assert model.generate(ids, use_cache=False, **settings).tolist() == model.generate(ids, **settings).tolist()


def test_beams_stay_with_their_row(model: AlignXForCausalLM) -> None:
    prompts = random_rows([5, 9, 2], seed=4)
    settings = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    ids, mask = padded(prompts, "left")
    together = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    for row, prompt in zip(together, prompts, strict=True):
        alone = torch.tensor([prompt])
        made = model.generate(alone, attention_mask=torch.ones_like(alone), **settings)
        assert made[0, len(prompt) :].tolist() == row.tolist()


def test_a_cache_that_has_lost_its_routing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 9: as if a release of transformers dropped the routing on its way through `generate`."""
    base = base_model()
    model, ids = aligned(base, low_rank_experts(base)), torch.tensor(random_rows([6]))
    update = AlignXForCausalLM._update_model_kwargs_for_generation

    def forget(self: AlignXForCausalLM, outputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        made: dict[str, Any] = update(self, outputs, *args, **kwargs)
        del kv_cache(made).routing
        return made

    monkeypatch.setattr(AlignXForCausalLM, "_update_model_kwargs_for_generation", forget)
    with pytest.raises(ValueError, match="the routing of their prompt"):
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_a_release_that_renames_the_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 10: as if a release kept the cache in something that is not found among a call's arguments."""
    base = base_model()
    model, ids = aligned(base, low_rank_experts(base)), torch.tensor(random_rows([6]))
    monkeypatch.setattr(modeling, "kv_cache", lambda values: None)
    with pytest.raises(ValueError, match="the routing of their prompt"):
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)


@torch.no_grad()
def test_a_step_whose_mask_covers_more_than_its_tokens_needs_their_routing(model: AlignXForCausalLM) -> None:
    ids = torch.tensor(random_rows([6]))
    with pytest.raises(ValueError, match="the routing of their prompt"):
        model(ids[:, -1:], torch.ones_like(ids))


@torch.no_grad()
def test_generation_continues_from_a_cache_with_its_routing() -> None:
    base = base_model()
    model, ids = aligned(base, low_rank_experts(base)), torch.tensor(random_rows([6]))
    settings = {"do_sample": False, "pad_token_id": 0}
    whole = model.generate(ids, max_new_tokens=6, **settings)
    first = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, **settings)
    rest = model.generate(first.sequences, max_new_tokens=3, **settings, **{ARGUMENT: kv_cache(first)})
    assert rest.tolist() == whole.tolist()
