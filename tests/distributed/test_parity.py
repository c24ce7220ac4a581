"""Invariant 3 on real ranks: the expert-parallel path at every ep_size is the fused path, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import ALIGNX_LAYERS, EXPERTS, IMBALANCED, MODES, PARITY_ROWS, cotangents, dense_parameters, mixture
from tiny_models import factor_gradients, one_hot, padded, relative
from torch import Tensor
from worlds import Runs

from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.mocae.layer import alignx_layers

Fused = tuple[dict[int, Tensor], dict[str, Tensor], dict[str, Tensor]]


def fused(mode: str, forced: list[int] | None = None, count: int = len(PARITY_ROWS)) -> Fused:
    """(logits by row, gradients of what all ranks share, gradients of every expert's factors), in one process.

    Of the first `count` rows.
    """
    top_k, training = MODES[mode]
    model = mixture(top_k).train(training)
    ids, mask = padded(PARITY_ROWS)
    logits = model(ids, mask, forced=one_hot(forced) if forced else None, use_cache=False).logits
    rows = {i: logits[i][mask[i].bool()] for i in range(count)}
    torch.stack([(row * cotangents()[i]).sum() for i, row in rows.items()]).sum().backward()
    experts = {}
    for index, layer in zip(ALIGNX_LAYERS, alignx_layers(model), strict=True):
        made = factor_gradients(layer.mixture)
        for p in PROJECTIONS:
            sides = {"down": made[f"down.{p}"].chunk(EXPERTS, dim=0), "up": made[f"up.{p}"].chunk(EXPERTS, dim=1)}
            experts |= {f"{index}.{e}.{s}.{p}": g for s, parts in sides.items() for e, g in enumerate(parts)}
    shared = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in dense_parameters(model).items()}
    return {i: row.detach() for i, row in rows.items()}, shared, experts


def summed(by_rank: list[dict[str, Tensor | None]], like: dict[str, Tensor]) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(t) for name, t in like.items()}
    for part in by_rank:
        for name, gradient in part.items():
            if gradient is not None:
                total[name] += gradient
    return total


def check(
    results: list[dict[str, Any]], mode: str, ep_size: int, forced: list[int] | None = None, count: int = 8
) -> None:
    logits, shared, experts = fused(mode, forced, count)
    made = {i: row for part in results for i, row in part["logits"].items() if len(row)}
    assert made.keys() == logits.keys()
    for i, row in logits.items():
        assert relative(made[i], row) < 1e-5
    for part in results:
        assert len(part["experts"]) == len(experts) // ep_size  # each rank hosts its own
        assert set(part["experts"]) <= set(experts)
    largest = max(float(g.abs().max()) for g in experts.values())
    for kind, expected in (("dense", shared), ("experts", experts)):
        found = summed([part[kind] for part in results], expected)
        for name, gradient in expected.items():
            allowed = 1e-4 * float(gradient.abs().max()) + 1e-6 * largest  # a lone gate's router: rounding only
            assert float((found[name] - gradient).abs().max()) <= allowed, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world", "ep_size"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_every_ep_size_is_the_fused_path(runs: Runs, world: int, ep_size: int, mode: str) -> None:
    check([part[f"{mode} ep{ep_size}"] for part in runs.of(world, "parity")], mode, ep_size)


def test_the_gradients_compared_are_not_all_zero() -> None:
    for mode in MODES:
        _, shared, experts = fused(mode)
        assert all(g.any() for n, g in shared.items() if "reinjection" in n or "strengths" in n)
        assert all(g.abs().max() > 1e-3 for n, g in shared.items() if "router" in n) == (mode != "top1")
        assert sum(bool(g.any()) for g in experts.values()) >= len(experts) / 2  # two of three specialists


@pytest.mark.parametrize("mode", ["top1", "dense"])
@pytest.mark.parametrize("name", IMBALANCED)
def test_idle_experts_and_crowded_ones(runs: Runs, name: str, mode: str) -> None:
    """Every token of a rank to one expert; experts that no row of a rank, or of any rank, reaches."""
    results = [part[f"{name} {mode}"] for part in runs.of(2, "imbalanced")]
    check(results, mode, 2, IMBALANCED[name])
    for part in results:
        assert all(g is not None and torch.isfinite(g).all() for g in part["experts"].values())


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_that_has_nothing_but_pads(runs: Runs, mode: str) -> None:
    """It takes part in the dispatch and changes nothing."""
    results = [part[f"pads alone {mode}"] for part in runs.of(2, "imbalanced")]
    assert [len(part["logits"]) for part in results] == [4, 4]
    assert not any(len(row) for row in results[1]["logits"].values())
    check(results, mode, 2, count=4)
    for part in results:
        gradients = [*part["experts"].values(), *(g for g in part["dense"].values() if g is not None)]
        assert all(torch.isfinite(g).all() for g in gradients)


def test_padding_is_what_a_lopsided_batch_costs(runs: Runs) -> None:
    results = [part["all to one top1"] for part in runs.of(2, "imbalanced")]
    tokens = [sum(map(len, PARITY_ROWS[:4])), sum(map(len, PARITY_ROWS[4:]))]
    for part, own in zip(results, tokens, strict=True):
        assert part["padding"] == pytest.approx([1 - own / (max(tokens) * EXPERTS)] * len(ALIGNX_LAYERS))
