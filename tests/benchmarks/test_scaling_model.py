"""The pure parts of the scaling benchmark: fits, drawings by hand, what a dispatch is counted at."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import cells, of_recipe
from processes import process_group
from scaling import efficiencies
from suite.cluster import WAYS, Assumptions, Drawn, Way, cost, draw, expert_parallel
from suite.collectives import listening, watching
from suite.costs import ALL_REDUCE, ALL_TO_ALL, Fit, Link, Traffic, communication, fit_compute, fit_link
from suite.ranks import Turns
from tiny_models import EXPERTS, HIDDEN, TABLE, base_model, generator, low_rank_experts

from alignx_ds.mocae.experts import PROJECTIONS, Factors
from alignx_ds.mocae.parallel import ParallelMixture

SIZES = [4.0**k * 1024 for k in range(8)]


def test_latency_and_bandwidth_are_recovered_from_points_that_have_them() -> None:
    found = fit_link(SIZES, [5e-5 + 2e-9 * s for s in SIZES])
    assert found.alpha == pytest.approx(5e-5, rel=1e-6) and found.beta == pytest.approx(2e-9, rel=1e-6)


def test_a_large_message_that_is_off_does_not_spoil_the_latency() -> None:
    seconds = [5e-5 + 2e-9 * s for s in SIZES]
    seconds[-1] *= 1.2  # by 6 ms, a hundred times the latency
    assert fit_link(SIZES, seconds).alpha == pytest.approx(5e-5, rel=0.1)


def test_neither_latency_nor_bandwidth_is_negative() -> None:
    falling = fit_link([1000, 2000, 4000], [4e-4, 3e-4, 2e-4])
    assert falling.beta == 0.0 and 2e-4 < falling.alpha < 4e-4
    steep = fit_link([1000, 2000, 4000], [1e-5, 4e-5, 2e-4])
    assert steep.alpha == 0.0 and steep.beta > 0.0


def test_compute_is_recovered_from_points_that_have_it() -> None:
    found = fit_compute([100, 200, 400], [0.03 + 0.001 * n for n in (100, 200, 400)])
    assert found.fixed == pytest.approx(0.03) and found.per_slot == pytest.approx(0.001)


def test_communication_is_calls_by_latency_and_bytes_by_bandwidth() -> None:
    traffic = {ALL_TO_ALL: Traffic(3, 1000), ALL_REDUCE: Traffic(2, 50)}
    links = {ALL_TO_ALL: Link(0.1, 0.01), ALL_REDUCE: Link(0.5, 0.2)}
    assert communication(traffic, links) == pytest.approx(3 * 0.1 + 1000 * 0.01 + 2 * 0.5 + 50 * 0.2)


def synthetic_worlds(left_out_factor: float) -> list[dict[str, Any]]:
    """One and two ranks, which compute 1.5 x slower, that keep to the model exactly but for two's largest batch."""
    links = {ALL_TO_ALL: (2e-4, 1e-9), ALL_REDUCE: (4e-4, 2e-9)}
    worlds = []
    for ranks in (1, 2):
        points = []
        for rows in (2, 4, 8):
            slots, calls = 50 * rows, 12 if ranks > 1 else 0
            traffic = {kind: {"calls": calls, "size": calls * 5000.0 * rows} for kind in links}
            talk = sum(calls * a + calls * 5000 * rows * b for a, b in links.values())
            milliseconds = 1000 * ((0.02 + 0.001 * slots) * (1.5 if ranks > 1 else 1) + talk)
            if (ranks, rows) == (2, 8):
                milliseconds *= left_out_factor
            rounds = [3 * milliseconds, milliseconds, 2 * milliseconds]  # two of them disturbed
            points.append({"rows": ranks * rows, "slots": slots, "traffic": traffic, "milliseconds": rounds})
        measured = {kind: [(s, a + b * s) for s in SIZES] for kind, (a, b) in links.items()} if ranks > 1 else {}
        alone = [80.0, 40.0, 200.0] if ranks == 1 else [90.0, 60.0, 70.0]
        worlds.append({"ranks": ranks, "links": measured, "alone": alone, "points": points})
    return worlds


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_the_point_left_out_is_predicted_and_not_fitted(factor: float) -> None:
    worlds = synthetic_worlds(factor)
    fit = Fit(worlds)
    assert fit.left_out == (2, 16) and fit.slower == {1: 1.0, 2: pytest.approx(1.5)}
    assert fit.compute.fixed == pytest.approx(0.02) and fit.compute.per_slot == pytest.approx(0.001)
    for world in worlds:
        for point in world["points"]:
            expected = 1 / factor - 1 if (world["ranks"], point["rows"]) == fit.left_out else 0.0
            assert fit.error(world["ranks"], point) == pytest.approx(expected, abs=1e-6)


def test_efficiency_is_of_the_rounds_that_ran_beside_each_other() -> None:
    one = {"rows": 4, "tokens": 400, "milliseconds": [100.0, 500.0, 100.0]}  # a slow round hits both worlds
    half = {"rows": 2, "tokens": 150, "milliseconds": [60.0, 300.0, 60.0]}
    two = {"rows": 4, "tokens": 400, "milliseconds": [80.0, 400.0, 80.0]}
    worlds = [{"ranks": 1, "points": [half, one]}, {"ranks": 2, "points": [two]}]
    strong, weak = efficiencies(worlds, worlds[1], two)
    assert strong == pytest.approx(100 / 80 / 2)
    assert weak == pytest.approx((400 / 80) / (150 / 60) / 2)
    assert efficiencies(worlds[1:], worlds[1], two) == (None, None)


ROUND = Assumptions(
    flops=1e12,
    overhead_ms=7.0,
    nvlink_latency_us=1000.0,
    nvlink_gb_s=100.0,
    ib_latency_us=2000.0,
    ib_gb_s=10.0,
    padding=0.2,
)
EXPERT_PARALLEL, FUSED3 = (next(way for way in WAYS if way.name == f"stage 2, {name}") for name in
                           ("expert parallel, ZeRO-2", "fused, ZeRO-3"))  # fmt: skip
FFN, ATTENTION, HEAD = 3 * 4096 * 11008, 4 * 4096 * 4096, 32000 * 4096  # of LLaMA-2-7B, with 32 layers
FACTORS = 4 * 16 * 3 * 64 * (4096 + 11008)  # of four experts of rank 64 in 16 layers
SHARED = 256 * 4 + 16 * (4096 * 32 + 2)  # router and output calibrations
TOKENS = 8 * 2048  # of a GPU and step


def drawn(way: Way, gpus: int, micro: int) -> Drawn:
    config, base = of_recipe("llama2-7b")
    config = way.settings(config, gpus, micro, ROUND, recomputed=False)
    return cost(config, base, way, gpus, micro, ROUND, peak=0.0, recomputed=False)


def test_expert_parallelism_is_drawn_as_a_hand_computes_it() -> None:
    """16 GPUs of two nodes, two micro batches, experts over 4 ranks, so 4 ranks share an expert."""
    found = drawn(EXPERT_PARALLEL, 16, 2)
    slots = TOKENS / 0.8
    moved = 4 * 16 * slots * 4 * 4096 * 2 * 3 / 4  # directions, layers, slots, experts, hidden, bytes, what leaves
    assert found.all_to_all == pytest.approx(4 * 16 * 2 * 1e-3 + moved / 1e11)
    shared = 4 * 2e-3 + 15 / 16 * SHARED * 2 / 1e10
    experts = 2 * 2e-3 + 3 / 4 * FACTORS / 4 * 2 / 1e10
    assert found.reduced == pytest.approx((2 + 1) * (shared + experts))  # reduced twice, gathered once
    assert found.gathered == 0.0 and found.tokens == 16 * TOKENS
    assert found.step == pytest.approx(found.compute + found.all_to_all + found.reduced + 7e-3)


def test_zero_3_gathers_the_weights_twice_in_every_micro_batch() -> None:
    found, fewer = drawn(FUSED3, 8, 4), drawn(FUSED3, 8, 2)
    weights = 32 * (ATTENTION + FFN + 2 * 4096) + 2 * HEAD + 4096
    above = 16 * (ATTENTION + FFN) + HEAD
    once = (32 + 16) * 3 * 1e-3 + 7 / 8 * (weights + above) * 2 / 1e11
    assert found.gathered == pytest.approx(4 * once) and fewer.gathered == pytest.approx(2 * once)
    assert found.reduced == pytest.approx(4 * (3 * 1e-3 + 7 / 8 * (FACTORS + SHARED) * 2 / 1e11))
    assert found.all_to_all == 0.0 and found.compute == fewer.compute


def test_one_gpu_sends_nothing() -> None:
    for way in WAYS:
        alone = drawn(way, 1, 1)
        assert alone.all_to_all == alone.gathered == alone.reduced == 0.0


def test_the_micro_batch_fits_and_the_fastest_way_is_marked() -> None:
    a = Assumptions(rows_per_gpu=2)
    points = [draw(*of_recipe("llama2-7b"), way, 8, a) for way in WAYS]
    assert all(p is not None and p.peak_gib <= 72 and p.micro_rows in (1, 2) for p in points)
    assert [way.name for way, cell in zip(WAYS, cells(points), strict=True) if "*" in cell] == [
        "stage 1, ZeRO-2",
        "stage 2, fused, ZeRO-2",
    ]
    larger = [draw(*of_recipe("llama2-70b"), way, 8, a) for way in WAYS]
    assert [cell == "-" for cell in cells(larger)] == [way.zero == 2 for way in WAYS]


def test_experts_stay_within_a_node() -> None:
    assert [expert_parallel(4, n, ROUND) for n in (1, 2, 6, 8, 1024)] == [1, 2, 2, 4, 4]


@pytest.mark.parametrize("trained_below", [True, False])
def test_bytes_are_those_that_the_layer_dispatches(trained_below: bool) -> None:
    """What reaches the experts and leaves them, and their gradients; the first layer's input has none."""
    base = base_model()
    ffn, specialists = TABLE.view(TABLE.ffn_of(base, 1)), low_rank_experts(base)[1]
    ranks = {p: specialists[0].rank(p) for p in PROJECTIONS}
    mixture = ParallelMixture(ffn, [Factors.zeros(ffn, ranks), *specialists], ep_size=1, ep_rank=0)
    passed: list[int] = []

    def size(tensors: tuple[Any, ...]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    experts = mixture.moe.deepspeed_moe.experts
    experts.register_forward_hook(lambda m, given, made: passed.extend((size(given), size((made,)))))
    experts.register_full_backward_hook(lambda m, back, came: passed.extend((size(back), size(came))))
    source = generator(5)
    x = torch.randn(3, 7, HIDDEN, generator=source, requires_grad=trained_below)
    gates = torch.rand(3, 1, EXPERTS, generator=source)
    mask = torch.ones(3, 7)
    mask[1, 4:] = 0  # three pads: not dispatched
    with watching(mixture) as seen:
        mixture(x, gates, mask).sum().backward()
    assert seen.capacities == [18] and seen.padding == [pytest.approx(0.0)]
    assert seen.size == sum(passed) == (4 if trained_below else 3) * 18 * EXPERTS * HIDDEN * 4


def test_worlds_take_turns(tmp_path: Path) -> None:
    spans: list[tuple[float, float, int]] = []

    def world(own: int) -> None:
        turns = Turns(tmp_path, [1, 2, 4], own)
        time.sleep(0.05 * own)  # some are ready late
        turns.ready()
        for _ in range(3):
            with turns.turn():
                start = time.monotonic()
                time.sleep(0.01)
                spans.append((start, time.monotonic(), own))

    threads = [threading.Thread(target=world, args=(own,)) for own in (4, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    spans.sort()
    assert [own for _, _, own in spans] == [1, 2, 4] * 3
    assert all(end <= start for (_, end, _), (start, _, _) in pairwise(spans))


def test_a_collective_is_counted_where_deepspeed_s_own_functions_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ZeRO-3 gathers weights: by a function of DeepSpeed that calls another one, and torch's by a reference."""
    with process_group():
        import deepspeed.comm

        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)  # a group of one is not counted
        given, gathered = torch.ones(8), torch.zeros(8)
        with listening() as tally:
            deepspeed.comm.allgather_fn(gathered, given)
        monkeypatch.undo()
    assert torch.equal(gathered, given)
    assert tally.traffic()[ALL_REDUCE] == Traffic(1, 0.5 * 8 * 4)
