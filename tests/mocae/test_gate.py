"""The gate: which experts keep a gate, and logits that are the sum of the router's and the calibrators' terms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from tiny_models import generator, random_geometry, relative

from alignx_ds.mocae.fractal import fractal_score
from alignx_ds.mocae.gate import CalibratedGate, Decision, Query, keep_top
from alignx_ds.mocae.settings import GateSettings
from alignx_ds.training.losses import gating_terms


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 1000))
def test_keep_top_keeps_the_best_and_their_proportions(experts: int, k: int, seed: int) -> None:
    gates = torch.randn(5, experts, generator=generator(seed)).softmax(-1)
    kept = keep_top(gates, k)
    k = min(k, experts)
    for row, chosen in zip(gates.tolist(), kept.tolist(), strict=True):
        best = sorted(range(experts), key=lambda e: -row[e])[:k]
        total = sum(row[e] for e in best)
        expected = [row[e] / total if e in best else 0.0 for e in range(experts)]
        np.testing.assert_allclose(chosen, expected, rtol=1e-5, atol=1e-7)


def test_keep_top_keeps_k_even_among_equals() -> None:
    for k in (1, 2, 3):
        kept = keep_top(torch.full((2, 4), 0.25), k)
        assert (kept > 0).sum(-1).tolist() == [k, k]
        assert torch.allclose(kept.sum(-1), torch.ones(2))


def make(temperature: float = 1.0, top_k: int = 1, absent: tuple[int, ...] = ()) -> CalibratedGate:
    geometry = random_geometry(6, 1)
    geometry.present[list(absent)] = 0
    gate = CalibratedGate(
        geometry, GateSettings(fractal=0.6, natural=0.4, lexical=0.8, temperature=temperature, top_k=top_k)
    ).eval()
    with torch.no_grad():
        gate.router.weight.copy_(torch.randn(4, 6, generator=generator(2)))
    return gate


def queries(count: int) -> Query:
    return Query(torch.randn(count, 32, generator=generator(3)), torch.randn(count, 4, generator=generator(4)))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_logits_are_the_design_s_formula(temperature: float) -> None:
    gate, query = make(temperature), queries(9)
    gate.calibration_temperature.fill_(1.7)
    g = gate.geometry
    z = (query.features - g.centre) @ g.projection.T
    expected = z.detach().numpy() @ gate.router.weight.detach().numpy().T / temperature
    fractal = fractal_score(z[:, :3], g.anchors, g.scales, g.dimensions).numpy()
    expected = expected + 0.6 * (fractal - float(g.score_shift[0])) / float(g.score_scale[0])
    for e in range(4):
        root = np.linalg.inv(g.whiteners[e].double().numpy())
        natural = multivariate_normal(g.means[e].double().numpy(), root @ root.T).logpdf(z.double().numpy()) / 6
        expected[:, e] += 0.4 * (natural - float(g.score_shift[1])) / float(g.score_scale[1])
    expected += 0.8 * query.words.numpy()
    np.testing.assert_allclose(gate(query).logits.detach().numpy(), expected / 1.7, rtol=1e-3, atol=1e-4)


def test_training_mixes_all_experts_and_serving_keeps_top_k() -> None:
    query = queries(9)
    for k in (1, 2, 4):
        gate = make(top_k=k)
        served, trained = gate(query), gate.train()(query)
        assert torch.equal(served.logits, trained.logits)
        assert torch.equal(trained.gates, trained.logits.softmax(-1))
        assert torch.equal(served.gates, keep_top(trained.gates, k))
        assert torch.equal(served.probabilities(), trained.gates)


def test_only_the_router_is_trained() -> None:
    gate = make()
    assert [n for n, _ in gate.named_parameters()] == ["router.weight", "router.bias"]
    assert {"centre", "means", "anchors", "calibration_temperature"} <= dict(gate.named_buffers()).keys()


def test_a_gate_cast_to_bf16_still_computes_in_fp32() -> None:
    gate, query = make(), queries(64)
    narrow = Query(query.features.bfloat16(), query.words)
    widened = Query(narrow.features.float(), query.words)
    rounded = make().to(torch.bfloat16)
    rounded_in_fp32 = make().to(torch.bfloat16).float()
    decision = rounded(narrow)
    assert decision.logits.dtype == decision.gates.dtype == torch.float32
    assert torch.equal(decision.logits, rounded_in_fp32(widened).logits)
    assert relative(decision.logits, gate(query).logits) < 0.2


ABSENT = [(3,), (0, 2)]
QUERIES = queries(64)


def without(gate: CalibratedGate, present: list[int]) -> CalibratedGate:
    """The same gate over the experts that are present, and no others."""
    g = gate.geometry
    by_expert = ("means", "whiteners", "log_volumes", "anchors", "dimensions", "present")
    smaller = CalibratedGate(replace(g, **{name: getattr(g, name)[present] for name in by_expert}), gate.settings)
    with torch.no_grad():
        smaller.router.weight.copy_(gate.router.weight[present])
        smaller.calibration_temperature.copy_(gate.calibration_temperature)
    return smaller.train(gate.training)


def among(present: list[int]) -> Query:
    return Query(QUERIES.features, QUERIES.words[:, present])


@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("temperature", [0.02, 55.0])
def test_an_absent_expert_has_no_gate_at_all(absent: tuple[int, ...], training: bool, temperature: float) -> None:
    """Exactly zero, mixed or chosen; the others' gates are those of a gate that never had it."""
    present = [e for e in range(4) if e not in absent]
    for k in (1, 2, len(present)):
        gate = make(top_k=k, absent=absent).train(training)
        gate.calibration_temperature.fill_(temperature)
        decision = gate(QUERIES)
        assert torch.equal(decision.gates[:, list(absent)], torch.zeros(64, len(absent)))
        assert torch.isfinite(decision.logits).all()
        assert not decision.probabilities()[:, list(absent)].any()
        expected = without(gate, present)(among(present))
        torch.testing.assert_close(decision.gates[:, present], expected.gates)


@pytest.mark.parametrize("absent", ABSENT)
def test_every_single_term_excludes_an_absent_expert(absent: tuple[int, ...]) -> None:
    """As the ablations use them."""
    present = [e for e in range(4) if e not in absent]
    whole = make().parts(QUERIES)
    for name, term in make(absent=absent).parts(QUERIES).items():
        assert not term.softmax(-1)[:, list(absent)].any(), name
        assert torch.equal(term[:, present], whole[name][:, present])


@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("temperature", [0.02, 55.0])
def test_an_absent_expert_leaves_every_loss_and_gradient_as_it_was(absent: tuple[int, ...], temperature: float) -> None:
    present = [e for e in range(4) if e not in absent]
    gate = make(absent=absent).train()
    gate.calibration_temperature.fill_(temperature)
    smaller = without(gate, present)
    labels = torch.arange(64) % len(present)

    def terms_of(owner: CalibratedGate, query: Query, experts: torch.Tensor) -> list[torch.Tensor]:
        decision: Decision = owner(query)
        return list(
            gating_terms(owner, query, decision, torch.nn.functional.one_hot(experts, query.words.shape[-1]).float())
        )

    found = terms_of(gate, QUERIES, torch.tensor(present)[labels])
    expected = terms_of(smaller, among(present), labels)
    for term, other in zip(found, expected, strict=True):
        torch.testing.assert_close(term, other, rtol=1e-4, atol=1e-6)
        (gradient,) = torch.autograd.grad(term, gate.router.weight, retain_graph=True)
        (wanted,) = torch.autograd.grad(other, smaller.router.weight, retain_graph=True)
        assert not gradient[list(absent)].any()
        torch.testing.assert_close(gradient[present], wanted, rtol=1e-3, atol=1e-5)
