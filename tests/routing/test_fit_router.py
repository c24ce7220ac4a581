"""The fitted router of a gate: a known one is found again, beside the calibrators."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import EXPERTS, aligned, base_model, generator, low_rank_experts, random_rows
from torch import Tensor
from torch.nn import functional

from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.mocae.gate import need_logits
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.serving import gates_of_needs
from alignx_ds.mocae.settings import GateSettings
from alignx_ds.routing.fit_router import RouterRows, fit_router, router_rows
from alignx_ds.routing.gate_terms import gate_terms, sum_of
from alignx_ds.routing.temperature import smoothed_choice, smoothed_needs

LATENT = 5
ALL = torch.ones(EXPERTS)
NEEDS, CHOICE = GateSettings(kind="needs", temperature=1.0), GateSettings(kind="choice", temperature=1.0)
BOTH = pytest.mark.parametrize("settings", [NEEDS, CHOICE], ids=["needs", "choice"])
TRUE = torch.tensor([[0.0] * LATENT, [2, 0, -1, 0, 0], [0, 1, 0, 0, 0.5], [-1, 0, 0, 0, 0]])
BIAS = torch.tensor([0, 0.5, -1, 0.3])


def drawn(count: int, seed: int, settings: GateSettings = NEEDS) -> RouterRows:
    """Label sets drawn from the probabilities of the router TRUE beside random offsets."""
    source = generator(seed)
    latents, offsets = torch.randn(count, LATENT, generator=source), 2 * torch.randn(count, EXPERTS, generator=source)
    logits = offsets + latents @ TRUE.T + BIAS
    if settings.kind == "choice":
        chosen = torch.multinomial(logits.softmax(-1), 1, generator=source)[:, 0]
        return RouterRows(latents, offsets, functional.one_hot(chosen, EXPERTS).float())
    odds = need_logits(logits)
    axes = (torch.rand(odds.shape, generator=source) < odds.sigmoid()).float()
    return RouterRows(latents, offsets, torch.cat([(axes.sum(-1, keepdim=True) == 0).float(), axes], -1))


def loss(router: dict[str, Tensor], rows: RouterRows, settings: GateSettings) -> float:
    logits = rows.offsets + rows.latents @ router["weight"].T + router["bias"]
    if settings.kind == "choice":
        return float(functional.cross_entropy(logits, rows.needs))
    return float(functional.binary_cross_entropy_with_logits(need_logits(logits), rows.needs[:, 1:]))


@BOTH
def test_a_known_router_is_found_beside_the_offsets(settings: GateSettings) -> None:
    router = fit_router(drawn(20000, 1, settings), drawn(4000, 2, settings), ALL, settings)
    if settings.kind == "choice":  # the softmax does not see what all experts have alike
        router = {name: found - found[0].clone() for name, found in router.items()}
    torch.testing.assert_close(router["weight"], TRUE, atol=0.12, rtol=0)
    torch.testing.assert_close(router["bias"], BIAS, atol=0.12, rtol=0)
    assert not router["weight"][0].any() and not router["bias"][0]


@BOTH
def test_the_penalty_is_chosen_on_unseen_rows(settings: GateSettings) -> None:
    """Of few rows, the least penalty fits the noise; it is not taken."""
    few, unseen, tested = (drawn(count, seed, settings) for count, seed in ((20, 3), (2000, 4), (2000, 5)))
    chosen = fit_router(few, unseen, ALL, settings)
    least, most = (fit_router(few, unseen, ALL, settings, [penalty]) for penalty in (1e-4, 1e2))
    assert loss(chosen, tested, settings) < min(loss(least, tested, settings), loss(most, tested, settings)) - 0.03
    torch.testing.assert_close(
        fit_router(few, few, ALL, settings),
        least,
        atol=1e-3,
        rtol=1e-3,
        msg="of the rows themselves, the least penalty",
    )


@BOTH
def test_no_other_router_has_a_smaller_loss(settings: GateSettings) -> None:
    """Beside the fit, with its penalty, the smoothed loss is greater in every direction."""
    rows, penalty = drawn(200, 11, settings), 0.01
    router = fit_router(rows, rows, ALL, settings, [penalty])
    labels = rows.needs.double()
    smoothed = smoothed_choice(labels) if settings.kind == "choice" else smoothed_needs(labels[:, 1:])

    def whole(weight: Tensor, bias: Tensor) -> float:
        logits = (rows.offsets + rows.latents @ weight.T + bias).double()
        if settings.kind == "choice":
            fit = functional.cross_entropy(logits, smoothed)
        else:
            fit = 3 * functional.binary_cross_entropy_with_logits(need_logits(logits), smoothed)
        return float(fit + 0.5 * penalty * weight.double().square().sum())

    least, source = whole(router["weight"], router["bias"]), generator(12)
    for _ in range(50):
        away = [0.05 * torch.randn(t.shape, generator=source) for t in (router["weight"], router["bias"])]
        assert whole(router["weight"] + away[0], router["bias"] + away[1]) > least


@BOTH
def test_the_state_is_multiplied_by_the_temperature_that_the_gate_divides_by(settings: GateSettings) -> None:
    rows = drawn(200, 9, settings)
    once, thrice = (fit_router(rows, rows, ALL, replace(settings, temperature=t), [0.1]) for t in (1.0, 3.0))
    for name, found in once.items():
        torch.testing.assert_close(thrice[name], 3 * found)


def test_a_row_of_weight_two_is_two_rows() -> None:
    rows, unseen = drawn(300, 6), drawn(300, 7)
    more = torch.arange(300) < 100
    twice = torch.cat([torch.arange(300), torch.arange(100)])
    doubled = RouterRows(rows.latents[twice], rows.offsets[twice], rows.needs[twice])
    weights = (1.0 + more) * 300 / 400
    weighed = fit_router(RouterRows(rows.latents, rows.offsets, rows.needs, weights), unseen, ALL, NEEDS, [0.01])
    # The targets are smoothed by the number of rows, which the weights don't change.
    torch.testing.assert_close(weighed, fit_router(doubled, unseen, ALL, NEEDS, [0.01]), atol=0.02, rtol=0)
    assert (weighed["weight"] - fit_router(rows, unseen, ALL, NEEDS, [0.01])["weight"]).abs().max() > 0.05


def test_rows_told_apart_without_a_fault_have_a_finite_fit_and_an_absent_expert_none() -> None:
    rows = drawn(400, 8)
    needs = torch.zeros_like(rows.needs)
    needs[:, 1], needs[:, 0] = rows.latents[:, 0] > 0, rows.latents[:, 0] <= 0
    apart = RouterRows(rows.latents, torch.zeros_like(rows.offsets), needs)
    router = fit_router(apart, apart, torch.tensor([1.0, 1, 1, 0]), NEEDS, [1e-9])
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
