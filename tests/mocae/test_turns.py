"""In a dialogue the last user turn decides; a kept KV cache is routed anew at every user turn, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import (
    ALIGNX_LAYERS,
    aligned,
    base_model,
    low_rank_experts,
    one_hot,
    padded,
    random_rows,
    relative,
)
from torch import Tensor
from transformers import DynamicCache, StaticCache

from alignx_ds.mocae.kv_cache import ARGUMENT, kv_cache
from alignx_ds.mocae.modeling import AlignXForCausalLM, Placement
from alignx_ds.mocae.routing_state import Routing
from alignx_ds.mocae.turns import query_mask, turn_start

TURN = [48, 49]  # begins a user turn; `said` draws texts without these tokens
CASES = [("fused", "shared", "choice"), ("fused", "per_layer", "needs"), ("parallel", "shared", "needs")]
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def model(request: pytest.FixtureRequest) -> AlignXForCausalLM:
    path, scope, kind = request.param
    return made(scope=scope, kind=kind, placement=Placement(1, 0) if path == "parallel" else None)


def made(**settings: Any) -> AlignXForCausalLM:
    base = base_model()
    model = aligned(base, low_rank_experts(base), **settings)
    model.config.user_turn = TURN
    return model


def said(lengths: list[int], seed: int) -> list[list[int]]:
    return [[token % 47 + 1 for token in row] for row in random_rows(lengths, seed=seed)]


def asked(lengths: list[int], seed: int) -> list[list[int]]:
    return [[*TURN, *row] for row in said(lengths, seed)]


def decided(model: AlignXForCausalLM) -> Tensor:
    return torch.stack([d.logits for d in model.routing.decisions.values()])


@pytest.mark.parametrize("turn", [[5], [5, 6], [5, 6, 5]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_place_of_the_sequence_is_found(turn: list[int], side: str) -> None:
    rows = [
        [1, *turn, 2, 3],
        [*turn, 1, 5, *turn, 4],
        [1, 2, 6, 5],
        [*turn],
        [7, *turn, *turn],
        [*turn, 9, turn[0]],  # begins with a whole one, ends with a part of one
    ]
    ids, mask = padded(rows, side, extra=2)
    ids[mask == 0] = turn[0]  # whatever stands in the padding
    found = query_mask(ids, mask, turn)
    for row, seen, inside in zip(rows, found, mask, strict=True):
        places = [i for i in range(len(row)) if row[i : i + len(turn)] == turn]
        assert seen[inside.bool()].tolist() == [int(i >= max(places, default=0)) for i in range(len(row))]
        assert not seen[~inside.bool()].any()
    assert torch.equal(query_mask(ids, mask, []), mask)
    assert turn_start(ids[:, :0], mask[:, :0], turn).tolist() == [-1] * len(rows)


@torch.no_grad()
def test_only_the_last_user_turn_decides(model: AlignXForCausalLM) -> None:
    """A gate sees earlier turns and a system prompt in nothing but what its own tokens have attended to."""
    (system, answer), (first, last) = said([7, 4], seed=1), asked([5, 6], seed=2)
    layer = ALIGNX_LAYERS[0]
    dialogue = [*system, *first, *answer, *last]
    ids, mask = padded([dialogue], "left", extra=3)
    seen: list[Tensor] = []
    hook = model.get_submodule(f"backbone.model.layers.{layer}.mlp").register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    model(ids, mask)
    hook.remove()
    states = seen[0][0, -len(last) :]
    summary = torch.cat([states.mean(0), states.amax(0), states.amin(0), states[-1]])
    query = model.routing.queries[layer]
    assert relative(query.features[0], summary) < 1e-6
    alone = torch.tensor([last])
    assert torch.allclose(query.words, model.lexicon(alone, torch.ones_like(alone)))


@torch.no_grad()
def test_an_answer_that_writes_a_user_turn_is_no_prompt(model: AlignXForCausalLM) -> None:
    (prompt,), (answer,) = asked([6], seed=3), asked([4], seed=4)
    ids = torch.tensor([prompt + answer])
    model(ids, torch.ones_like(ids), (torch.arange(ids.shape[1]) < len(prompt)).long()[None])
    decision = decided(model)
    model(torch.tensor([prompt]))
    assert relative(decided(model), decision) < 1e-5


def rows_of_two_turns() -> tuple[list[list[int]], list[list[int]]]:
    """Three first turns with their answers, and what follows: a user turn, more of the answer, and a user turn."""
    before = [a + b for a, b in zip(asked([5, 8, 3], seed=5), said([4, 2, 6], seed=6), strict=True)]
    second = asked([6, 6, 3], seed=7)
    return before, [second[0], said([5], seed=8)[0], second[2]]


@torch.no_grad()
def test_a_kept_cache_is_routed_anew_in_the_rows_with_a_user_turn(model: AlignXForCausalLM) -> None:
    before, after = rows_of_two_turns()
    (ids, mask), (more, more_mask) = padded(before, "left"), padded(after, "left")
    first = model(ids, mask, use_cache=True)
    kept, kept_queries = decided(model), dict(model.routing.queries)
    whole = torch.cat([mask, more_mask], 1)
    second = model(more, whole, use_cache=True, **{ARGUMENT: kv_cache(first)})
    routing, found = kv_cache(second).routing, decided(model)
    assert isinstance(routing, Routing) and routing is model.routing
    assert torch.equal(found[:, 1], kept[:, 1])
    for layer, query in routing.queries.items():
        assert torch.equal(query.features[1], kept_queries[layer].features[1])
    model(torch.cat([ids, more], 1), whole, use_cache=False)
    full = decided(model)
    for row in (0, 2):
        assert relative(found[0, row], full[0, row]) < 1e-5, "the lowest gate sees what it sees in a full pass"
        assert relative(found[:, row], kept[:, row]) > 1e-3


@torch.no_grad()
def test_logits_across_turns(model: AlignXForCausalLM) -> None:
    """As in one full pass if both turns have one decision; else the first turn's keys and values are another expert's.

    The distance is that of the lowest layer's experts, which are as large as the base's own weights here.
    """
    before, after = ([rows[0], rows[2]] for rows in rows_of_two_turns())
    (ids, mask), (more, more_mask) = padded(before, "left"), padded(after, "left")
    whole_ids, whole = torch.cat([ids, more], 1), torch.cat([mask, more_mask], 1)

    def continued(forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first = model(ids, mask, use_cache=True, forced=forced)
        second = model(more, whole, use_cache=True, **{ARGUMENT: kv_cache(first)}).logits
        full = model(whole_ids, whole, use_cache=False, forced=forced).logits
        return second[more_mask.bool()], full[:, ids.shape[1] :][more_mask.bool()]

    assert relative(*continued(one_hot([2, 1]))) < 1e-5
    assert 0.05 < relative(*continued()) < 1


@torch.no_grad()
def test_within_the_second_turn_decoding_is_one_pass(model: AlignXForCausalLM) -> None:
    """What was gathered for the first turn's experts is not used for the second's."""
    before, after = rows_of_two_turns()
    (ids, mask), (more, more_mask) = padded(before, "left"), padded(after, "left")
    answers = torch.tensor(said([5] * 3, seed=9))
    none = torch.cat([more_mask, torch.zeros_like(answers)], 1)
    whole = torch.cat([mask, more_mask, torch.ones_like(answers)], 1)

    def started() -> Any:
        first = model(ids, mask, use_cache=True)
        step = model(answers[:, :1], torch.cat([mask, mask.new_ones(3, 1)], 1), **{ARGUMENT: kv_cache(first)})
        kv_cache(step).crop(-1)
        return kv_cache(step)

    at_once = model(torch.cat([more, answers], 1), whole, none, use_cache=True, **{ARGUMENT: started()}).logits
    out = model(more, whole[:, :-5], use_cache=True, **{ARGUMENT: started()})
    logits, routing = [out.logits], kv_cache(out).routing
    for n in range(5):
        seen = whole[:, : whole.shape[1] - 4 + n]
        out = model(answers[:, n : n + 1], seen, use_cache=True, **{ARGUMENT: kv_cache(out)})
        assert kv_cache(out).routing is routing
        logits.append(out.logits)
    inside = torch.cat([more_mask, torch.ones_like(answers)], 1).bool()
    assert relative(torch.cat(logits, 1)[inside], at_once[inside]) < 1e-5


@pytest.mark.parametrize("static", [False, True])
def test_generate_continues_a_dialogue(model: AlignXForCausalLM, static: bool) -> None:
    """`input_ids` with the whole dialogue, and the cache of its first turn."""
    (question, second), settings = asked([6, 7], seed=10), {**GREEDY, "return_dict_in_generate": True}
    text = model.config.text_config
    kept = StaticCache(config=text, max_cache_len=40) if static else DynamicCache(config=text)
    ids = torch.tensor([question])
    first = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **settings, **{ARGUMENT: kept})
    dialogue = torch.cat([first.sequences, torch.tensor([second])], 1)
    before = decided(model)[0]
    model(dialogue, use_cache=False)
    expected = decided(model)[0]
    more = {"attention_mask": torch.ones_like(dialogue), "max_new_tokens": 3, **settings, ARGUMENT: kept}
    assert model.generate(dialogue, **more).sequences.shape[1] == dialogue.shape[1] + 3
    assert relative(decided(model)[0], expected) < 1e-5
    assert relative(before, expected) > 1e-3


def test_candidates_of_assisted_decoding_are_no_user_turn(model: AlignXForCausalLM) -> None:
    """Prompt lookup proposes what followed in the prompt, user turns too."""
    (a, b), (repeated,) = asked([4, 3], seed=11), said([3], seed=12)
    ids = torch.tensor([a + repeated + b + repeated])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **GREEDY)
    model(ids)
    decision = decided(model)
    lookup = {"prompt_lookup_num_tokens": 8, "max_matching_ngram_size": 2}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **GREEDY, **lookup)
    assert relative(decided(model), decision) < 1e-5
    assert made.tolist() == plain.tolist()


@torch.no_grad()
def test_a_step_of_one_token_never_looks_for_a_user_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would make the host wait for the device."""
    model, ids = made(), torch.tensor(asked([6], seed=13))
    model.config.user_turn = [48]
    out = model(ids, use_cache=True)
    routing = kv_cache(out).routing
    monkeypatch.setattr("alignx_ds.mocae.modeling.turn_start", lambda *_: pytest.fail("it looked"))
    out = model(torch.tensor([[48]]), use_cache=True, **{ARGUMENT: kv_cache(out)})
    assert kv_cache(out).routing is routing


def test_a_config_keeps_the_sequence(tmp_path: Any) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    loaded = AlignXForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.user_turn == TURN
    first, second = asked([5, 6], seed=14)
    ids = torch.tensor([first + second])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    older = model.config.to_dict()
    del older["user_turn"]
    assert type(model.config).from_dict(older).user_turn == []
