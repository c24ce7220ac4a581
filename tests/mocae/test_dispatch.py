"""The dispatch turns gates into the routes that DeepSpeed's MoE layer expects, and the layer computes their mixture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    EXPERTS,
    HIDDEN,
    TABLE,
    base_model,
    factor_gradients,
    generator,
    low_rank_experts,
    one_hot,
    relative,
)
from torch import Tensor

from alignx_ds.mocae.experts import PROJECTIONS, Factors, FeedForward
from alignx_ds.mocae.fused import FusedMixture
from alignx_ds.mocae.gate import keep_top
from alignx_ds.mocae.parallel import Dispatch, ParallelMixture


def routes_of(token_gates: Tensor) -> tuple[Dispatch, Tensor, int, int, Tensor, Tensor, Tensor, Tensor]:
    dispatch = Dispatch(token_gates.shape[1])
    dispatch.token_gates = token_gates
    return dispatch, *dispatch(torch.zeros(token_gates.shape[0], HIDDEN), None, True, False)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
def test_every_gate_gets_a_slot_of_its_own_and_pads_get_none(tokens: int, experts: int, k: int, seed: int) -> None:
    source = generator(seed)
    gates = keep_top(torch.randn(tokens, experts, generator=source).softmax(-1), k)
    pads = torch.rand(tokens, generator=source) < 0.3
    gates = gates.masked_fill(pads.unsqueeze(-1), 0.0)
    dispatch, l_aux, capacity, count, ids, slots, values, loads = routes_of(gates)
    assert count == experts and float(l_aux) == 0.0
    assert loads.tolist() == (gates > 0).sum(0).tolist()
    assert capacity == max(1, int(loads.max()))
    used: set[tuple[int, int]] = set()
    rebuilt = torch.zeros_like(gates)
    for route, token in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(tokens)).tolist():
        expert, slot = int(ids[route, token]), int(slots[route, token])
        if expert == -1:
            assert float(values[route, token]) == 0.0
            continue
        assert not pads[token] and 0 <= slot < capacity and (expert, slot) not in used
        used.add((expert, slot))
        rebuilt[token, expert] = values[route, token]
    assert torch.equal(rebuilt, gates)
    assert dispatch.padding_fraction == pytest.approx(1 - len(used) / (capacity * experts))


def test_padding_is_the_share_of_empty_slots() -> None:
    assert routes_of(one_hot([2] * 8))[0].padding_fraction == pytest.approx(0.75)
    assert routes_of(one_hot([0, 1, 2, 3] * 2))[0].padding_fraction == pytest.approx(0.0)


def test_the_routes_carry_the_gates_gradient() -> None:
    raw = torch.randn(6, EXPERTS, generator=generator(1), requires_grad=True)
    gates = raw.softmax(-1)
    _, _, _, _, ids, _, values, _ = routes_of(gates)
    weights = torch.randn(6, EXPERTS, generator=generator(2))
    picked = (values * weights.gather(1, ids.T).T).sum()
    (through_routes,) = torch.autograd.grad(picked, raw, retain_graph=True)
    (direct,) = torch.autograd.grad((gates * weights).sum(), raw)
    assert relative(through_routes, direct) < 1e-6


def test_a_changed_contract_is_noticed() -> None:
    dispatch = Dispatch(EXPERTS)
    dispatch.token_gates = one_hot([0, 1])
    with pytest.raises(AssertionError):
        dispatch(torch.zeros(2, HIDDEN), None, False, False)
    with pytest.raises(AssertionError):
        dispatch(torch.zeros(3, HIDDEN), None, True, False)


def mixtures() -> tuple[FeedForward, FusedMixture, ParallelMixture]:
    base = base_model()
    view = TABLE.view(TABLE.ffn_of(base, 1))
    experts = [Factors.zeros(view, dict.fromkeys(PROJECTIONS, 3)), *low_rank_experts(base)[1]]
    return view, FusedMixture(view, experts), ParallelMixture(view, experts, 1, 0)


def test_pads_are_not_computed() -> None:
    _, fused, parallel = mixtures()
    x = torch.randn(2, 5, HIDDEN, generator=generator(1))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    gates = one_hot([1, 2]).unsqueeze(1)
    y = parallel(x, gates, mask)
    assert torch.count_nonzero(y[0, 3:]) == 0
    assert relative(y[mask.bool()], fused(x, gates)[mask.bool()]) < 1e-5
    assert parallel.dispatch.padding_fraction == pytest.approx(1 - 8 / (5 * 4))  # loads 0, 3, 5, 0


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradients_of_gates_input_and_factors_are_those_of_the_fused_path(k: int) -> None:
    _, fused, parallel = mixtures()
    fused.train(), parallel.train()
    raw = keep_top(torch.randn(3, 1, EXPERTS, generator=generator(5)).softmax(-1), k)
    cotangent = torch.randn(3, 6, HIDDEN, generator=generator(6))
    found = []
    for mixture in (fused, parallel):
        x = torch.randn(3, 6, HIDDEN, generator=generator(4), requires_grad=True)
        gates = raw.clone().requires_grad_()
        (mixture(x, gates) * cotangent).sum().backward()
        assert x.grad is not None and gates.grad is not None
        found.append((x.grad, gates.grad * (raw > 0)))  # a route that was not taken has no gradient to compare
    assert relative(found[1][0], found[0][0]) < 1e-5
    assert relative(found[1][1], found[0][1]) < 1e-5
    expected = factor_gradients(fused)
    for p in PROJECTIONS:
        down = torch.cat([e.down[p].grad for e in parallel.local_experts()])
        up = torch.cat([e.up[p].grad for e in parallel.local_experts()], dim=1)
        assert relative(down, expected[f"down.{p}"]) < 1e-5
        assert relative(up, expected[f"up.{p}"]) < 1e-5


def test_every_token_to_one_expert_and_no_token_at_all() -> None:
    _, fused, parallel = mixtures()
    x = torch.randn(2, 5, HIDDEN, generator=generator(1))
    gates = one_hot([3, 3]).unsqueeze(1)
    y = parallel(x, gates)
    assert relative(y, fused(x, gates)) < 1e-5
    y.sum().backward()
    empty = parallel(x, gates, torch.zeros(2, 5))
    assert torch.count_nonzero(empty) == 0
