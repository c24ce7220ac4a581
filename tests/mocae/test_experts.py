"""An expert is the base FFN with a low-rank change of each projection, however the factors are stored."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TABLE, base_model, generator, one_hot, random_factors, relative
from torch import Tensor
from torch.nn.functional import linear, silu

from alignx_ds.mocae.experts import PROJECTIONS, Factors, FeedForward, LowRankExpert, align_ranks
from alignx_ds.mocae.fused import FusedMixture
from alignx_ds.mocae.grouped import Groups
from alignx_ds.mocae.parallel import ParallelMixture


@pytest.fixture(scope="module")
def base() -> FeedForward:
    return TABLE.view(TABLE.ffn_of(base_model(), 1))


def experts_of_ranks(*ranks: int) -> list[Factors]:
    source, model = generator(5), base_model()
    return [random_factors(model, 1, r, source) for r in ranks]


def with_generalist(base: FeedForward, *ranks: int) -> list[Factors]:
    return [Factors.zeros(base, dict.fromkeys(PROJECTIONS, 1)), *experts_of_ranks(*ranks)]


def dense(base: FeedForward, factors: Factors, x: Tensor) -> Tensor:
    """The FFN with its weights changed, as a specialist would compute it."""
    weights = {p: base.projection(p).weight + factors.delta(p) for p in PROJECTIONS}
    return linear(silu(linear(x, weights["gate"])) * linear(x, weights["up"]), weights["down"])


def test_a_hosted_expert_is_the_ffn_with_changed_weights(base: FeedForward) -> None:
    factors = experts_of_ranks(4)[0]
    expert = LowRankExpert(factors, torch.float32)
    expert.attach(base)
    x = torch.randn(3, 7, 32, generator=generator(0))
    assert relative(expert(x), dense(base, factors, x)) < 1e-5
    assert relative(expert(x), dense(base, Factors.zeros(base, dict.fromkeys(PROJECTIONS, 4)), x)) > 0.1


def test_a_hosted_expert_registers_its_own_factors_only(base: FeedForward) -> None:
    expert = LowRankExpert(experts_of_ranks(4)[0], torch.float32)
    expert.attach(base)
    assert {n for n, _ in expert.named_parameters()} == {f"{s}.{p}" for s in ("down", "up") for p in PROJECTIONS}


def test_aligned_ranks_keep_every_change(base: FeedForward) -> None:
    experts = [*experts_of_ranks(1, 5, 3), Factors.zeros(base, dict.fromkeys(PROJECTIONS, 2))]
    padded = align_ranks(experts)
    for before, after in zip(experts, padded, strict=True):
        for p in PROJECTIONS:
            assert after.rank(p) == 5
            assert torch.equal(before.delta(p), after.delta(p)) or relative(after.delta(p), before.delta(p)) < 1e-6


def test_a_rank_is_never_cut_by_padding() -> None:
    with pytest.raises(AssertionError):
        experts_of_ranks(5)[0].padded(dict.fromkeys(PROJECTIONS, 4))


@pytest.mark.parametrize("kind", ["fused", "parallel"])
def test_a_mixture_gives_back_the_factors_that_it_was_made_of(base: FeedForward, kind: str) -> None:
    experts = with_generalist(base, 2, 4, 1)
    mixture = FusedMixture(base, experts) if kind == "fused" else ParallelMixture(base, experts, 1, 0)
    for before, after in zip(experts, mixture.factors(), strict=True):
        for p in PROJECTIONS:
            assert torch.allclose(after.delta(p), before.delta(p), atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("kind", ["fused", "parallel"])
@pytest.mark.parametrize("training", [True, False])
def test_a_mixture_is_the_gated_sum_of_changed_ffns(base: FeedForward, kind: str, top_k: int, training: bool) -> None:
    experts = with_generalist(base, 4, 4, 1)
    mixture = FusedMixture(base, experts) if kind == "fused" else ParallelMixture(base, experts, 1, 0)
    mixture.train(training)
    x = torch.randn(3, 7, 32, generator=generator(1))
    raw = torch.rand(3, 1, 4, generator=generator(2)) + 0.1
    kept = raw.scatter(-1, raw.topk(4 - top_k, largest=False).indices, 0.0)
    gates = kept / kept.sum(-1, keepdim=True)
    expected = sum(gates[..., i : i + 1] * dense(base, e, x) for i, e in enumerate(experts))
    assert isinstance(expected, Tensor)
    assert relative(mixture(x, gates), expected) < 1e-5


@pytest.mark.parametrize("kind", ["fused", "parallel"])
@pytest.mark.parametrize("training", [True, False])
def test_every_token_may_have_its_own_gates(base: FeedForward, kind: str, training: bool) -> None:
    experts = with_generalist(base, 3, 3, 3)
    mixture = FusedMixture(base, experts) if kind == "fused" else ParallelMixture(base, experts, 1, 0)
    mixture.train(training)
    x = torch.randn(2, 4, 32, generator=generator(1))
    choice = [[0, 3, 1, 1], [2, 2, 0, 3]]
    y = mixture(x, torch.stack([one_hot(row) for row in choice]))
    for b, row in enumerate(choice):
        for t, e in enumerate(row):
            assert relative(y[b, t], dense(base, experts[e], x[b, t])) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 5), (2, 1), (5, 1), (5, 4)])
def test_every_way_of_mixing_is_the_same_function(base: FeedForward, rows: int, length: int, count: int) -> None:
    """Gathered factors, stacked ones, or every expert: which is taken depends on the shapes alone."""
    experts = with_generalist(base, 4, 2, 4)
    mixture = FusedMixture(base, experts)
    x = torch.randn(rows, length, 32, generator=generator(1))
    gates = torch.zeros(rows, 1, 4)
    for row in range(rows):  # the generalist is chosen too
        for j in range(count):
            gates[row, 0, (row + j) % 4] = (1 + j) / sum(range(1, count + 1))
    expected = sum(gates[..., i : i + 1] * dense(base, e, x) for i, e in enumerate(experts))
    assert isinstance(expected, Tensor)
    assert relative(mixture(x, gates), expected) < 1e-5
    assert relative(mixture(x, gates, count), expected) < 1e-5
    assert relative(mixture(x, gates, count, mixture.gather(gates, count)), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("chosen", [[2, 0, 3, 2, 1], [0, 1, 1, 3], [3, 3, 3], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("length", [1, 4])
def test_rows_grouped_by_expert_have_their_own_expert_s_output(
    base: FeedForward, chosen: list[int], length: int
) -> None:
    experts = with_generalist(base, 4, 2, 4)
    mixture = FusedMixture(base, experts)
    x = torch.randn(len(chosen), length, 32, generator=generator(1))
    groups = Groups.of(one_hot(chosen).unsqueeze(1))
    assert (groups.order is None) == (sorted(chosen) == chosen), "rows that are in order are not copied"
    assert [s + 1 for s, _, _ in groups.parts] == sorted(set(chosen) - {0})
    y = mixture(x, groups)
    for row, expert in enumerate(chosen):
        assert relative(y[row], dense(base, experts[expert], x[row])) < 1e-5


def test_a_prompt_s_own_factors_are_gathered_only_where_they_are_fewer(base: FeedForward) -> None:
    mixture = FusedMixture(base, with_generalist(base, 4, 4, 4))
    assert [mixture.fewer_by_row(rows, 1) for rows in (1, 2, 3, 8)] == [True, True, False, False]
    assert [mixture.fewer_by_row(1, count) for count in (2, 3, 4)] == [True, False, False]


@torch.no_grad()
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (5, 1), (3, 6)])
def test_in_bf16_both_paths_agree_within_its_rounding(rows: int, length: int) -> None:
    model = base_model()
    experts = with_generalist(TABLE.view(TABLE.ffn_of(model, 1)), 4, 4, 4)
    base = TABLE.view(TABLE.ffn_of(model.to(torch.bfloat16), 1))
    fused, parallel = FusedMixture(base, experts), ParallelMixture(base, experts, 1, 0)
    x = torch.randn(rows, length, 32, generator=generator(1)).bfloat16()
    gates = one_hot([row % 4 for row in range(rows)]).unsqueeze(1)
    y = fused(x, gates, 1)
    assert y.dtype == torch.bfloat16
    assert relative(y.float(), parallel(x, gates).float()) < 2 * torch.finfo(torch.bfloat16).eps
