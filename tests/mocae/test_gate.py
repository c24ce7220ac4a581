"""The gate: which experts keep a gate, and logits that are the sum of the router's and the calibrators' terms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from tiny_models import generator, random_geometry, relative

from alignx_ds.mocae.fractal import fractal_score
from alignx_ds.mocae.gate import CalibratedGate, GateSettings, keep_top


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


def make(temperature: float = 1.0, top_k: int = 1) -> CalibratedGate:
    gate = CalibratedGate(random_geometry(6, 1), GateSettings(0.6, 0.4, temperature, top_k)).eval()
    with torch.no_grad():
        gate.router.weight.copy_(torch.randn(4, 6, generator=generator(2)))
    return gate


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_logits_are_the_design_s_formula(temperature: float) -> None:
    gate, h = make(temperature), torch.randn(9, 32, generator=generator(3))
    gate.calibration_temperature.fill_(1.7)
    g = gate.geometry
    z = (h - g.centre) @ g.projection.T
    expected = z.detach().numpy() @ gate.router.weight.detach().numpy().T / temperature
    fractal = fractal_score(z[:, :3], g.anchors, g.scales, g.dimensions).numpy()
    expected = expected + 0.6 * (fractal - float(g.score_shift[0])) / float(g.score_scale[0])
    for e in range(4):
        root = np.linalg.inv(g.whiteners[e].double().numpy())
        natural = multivariate_normal(g.means[e].double().numpy(), root @ root.T).logpdf(z.double().numpy()) / 6
        expected[:, e] += 0.4 * (natural - float(g.score_shift[1])) / float(g.score_scale[1])
    np.testing.assert_allclose(gate(h).logits.detach().numpy(), expected / 1.7, rtol=1e-3, atol=1e-4)


def test_training_mixes_all_experts_and_serving_keeps_top_k() -> None:
    h = torch.randn(9, 32, generator=generator(3))
    for k in (1, 2, 4):
        gate = make(top_k=k)
        served, trained = gate(h), gate.train()(h)
        assert torch.equal(served.logits, trained.logits)
        assert torch.equal(trained.gates, trained.logits.softmax(-1))
        assert torch.equal(served.gates, keep_top(trained.gates, k))
        assert torch.equal(served.probabilities(), trained.gates)


def test_only_the_router_is_trained() -> None:
    gate = make()
    assert [n for n, _ in gate.named_parameters()] == ["router.weight"]
    assert {"centre", "means", "anchors", "calibration_temperature"} <= dict(gate.named_buffers()).keys()


def test_a_gate_cast_to_bf16_still_computes_in_fp32() -> None:
    gate, h = make(), torch.randn(64, 32, generator=generator(3))
    rounded = make().to(torch.bfloat16)
    rounded_in_fp32 = make().to(torch.bfloat16).float()
    decision = rounded(h.bfloat16())
    assert decision.logits.dtype == decision.gates.dtype == torch.float32
    assert torch.equal(decision.logits, rounded_in_fp32(h.bfloat16().float()).logits)
    assert relative(decision.logits, gate(h).logits) < 0.2
