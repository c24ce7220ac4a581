"""The fitted router of a gate for needs: a known one is found again, beside the calibrators."""

from __future__ import annotations

import pytest
import torch
from tiny_models import EXPERTS, aligned, base_model, generator, low_rank_experts, random_rows
from torch import Tensor

from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.mocae.gate import need_logits
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.serving import gates_of_needs
from alignx_ds.routing.fit_router import RouterRows, fit_router, router_rows
from alignx_ds.routing.gate_terms import gate_terms, sum_of

LATENT = 5
ALL = torch.ones(EXPERTS)
TRUE = torch.tensor([[0.0] * LATENT, [2, 0, -1, 0, 0], [0, 1, 0, 0, 0.5], [-1, 0, 0, 0, 0]])
BIAS = torch.tensor([0, 0.5, -1, 0.3])


def drawn(count: int, seed: int) -> RouterRows:
    """Label sets drawn from the probabilities of the router TRUE beside random offsets."""
    source = generator(seed)
    latents, offsets = torch.randn(count, LATENT, generator=source), 2 * torch.randn(count, EXPERTS, generator=source)
    odds = need_logits(offsets + latents @ TRUE.T + BIAS)
    axes = (torch.rand(odds.shape, generator=source) < odds.sigmoid()).float()
    return RouterRows(latents, offsets, torch.cat([(axes.sum(-1, keepdim=True) == 0).float(), axes], -1))


def loss(router: dict[str, Tensor], rows: RouterRows) -> float:
    odds = need_logits(rows.offsets + rows.latents @ router["weight"].T + router["bias"])
    return float(torch.nn.functional.binary_cross_entropy_with_logits(odds, rows.needs[:, 1:]))


def test_a_known_router_is_found_beside_the_offsets() -> None:
    router = fit_router(drawn(20000, 1), drawn(4000, 2), ALL)
    torch.testing.assert_close(router["weight"], TRUE, atol=0.12, rtol=0)
    torch.testing.assert_close(router["bias"], BIAS, atol=0.12, rtol=0)
    assert not router["weight"][0].any() and not router["bias"][0]


def test_the_penalty_is_chosen_on_unseen_rows() -> None:
    """Of few rows, the least penalty fits the noise; it is not taken."""
    few, unseen, tested = drawn(20, 3), drawn(2000, 4), drawn(2000, 5)
    chosen = fit_router(few, unseen, ALL)
    least, most = (fit_router(few, unseen, ALL, [penalty]) for penalty in (1e-4, 1e2))
    assert loss(chosen, tested) < min(loss(least, tested), loss(most, tested)) - 0.03
    torch.testing.assert_close(fit_router(few, few, ALL), least, msg="of the rows themselves, the least penalty")


def test_a_row_of_weight_two_is_two_rows() -> None:
    rows, unseen = drawn(300, 6), drawn(300, 7)
    more = torch.arange(300) < 100
    twice = torch.cat([torch.arange(300), torch.arange(100)])
    doubled = RouterRows(rows.latents[twice], rows.offsets[twice], rows.needs[twice])
    weights = (1.0 + more) * 300 / 400
    weighed = fit_router(RouterRows(rows.latents, rows.offsets, rows.needs, weights), unseen, ALL, [0.01])
    # The targets are smoothed by the number of rows, which the weights don't change.
    torch.testing.assert_close(weighed, fit_router(doubled, unseen, ALL, [0.01]), atol=0.02, rtol=0)
    assert (weighed["weight"] - fit_router(rows, unseen, ALL, [0.01])["weight"]).abs().max() > 0.05


def test_rows_told_apart_without_a_fault_have_a_finite_fit_and_an_absent_expert_none() -> None:
    rows = drawn(400, 8)
    needs = torch.zeros_like(rows.needs)
    needs[:, 1], needs[:, 0] = rows.latents[:, 0] > 0, rows.latents[:, 0] <= 0
    apart = RouterRows(rows.latents, torch.zeros_like(rows.offsets), needs)
    router = fit_router(apart, apart, torch.tensor([1.0, 1, 1, 0]), [1e-9])
    assert 5 < router["weight"][1, 0] < 20
    assert router["bias"][2] < -5, "no row needs it"
    assert not router["weight"][3].any() and not router["bias"][3]
    assert all(torch.isfinite(t).all() for t in router.values())


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
def test_the_rows_of_a_router_are_those_of_the_gates(scope: str) -> None:
    """Latents and offsets give the gate's logits; a gate above other layers sees the needed experts' work."""
    base = base_model()
    model = aligned(base, low_rank_experts(base), scope=scope, kind="needs")
    examples = [Example(tuple(ids), n) for ids, n in zip(random_rows([5, 9, 7]), [3, 6, 7], strict=True)]
    rows = LabelledExamples(examples, [1, 2, 0], [(1, 3), (2,), (0,)])
    found, terms = router_rows(model, rows, 0, 2), gate_terms(model, rows, 0, 2)
    gates = gates_of(model)
    assert found.keys() == gates.keys()
    lowest = min(gates)
    inputs, router = found[lowest], gates[lowest].router
    torch.testing.assert_close(router(inputs.latents) + inputs.offsets, sum_of(terms[lowest]))
    for i, example in enumerate(examples):
        forced = gates_of_needs(inputs.needs[i : i + 1, 1:])
        model(torch.tensor([example.ids[: example.prompt_length]]), forced=forced)
        for layer, gate in gates.items():
            latent = gate.latent(model.routing.queries[layer])[0]
            torch.testing.assert_close(found[layer].latents[i], latent, atol=1e-4, rtol=1e-4)
