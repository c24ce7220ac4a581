"""Calibration figures against scikit-learn and brute force, and the temperature against the NLL it minimises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch import Tensor
from torch.nn import functional

from alignx_ds.routing.metrics import BINS, confusion, expected_calibration_error, router_metrics
from alignx_ds.routing.temperature import fit_temperature

CASES = given(seed=st.integers(0, 10_000), rows=st.integers(1, 300), experts=st.integers(2, 6))
few = settings(max_examples=40, deadline=None)


def case(seed: int, rows: int, experts: int, sharpness: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(rows, experts, generator=generator, dtype=torch.float64)
    return logits, torch.randint(experts, (rows,), generator=generator)


def brute_force_ece(probabilities: Tensor, labels: Tensor, bins: int) -> float:
    """The definition, row by row, in plain Python."""
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for p, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        confidence = max(p)
        members[min(bins - 1, math.floor(confidence * bins))].append((confidence, p.index(confidence) == label))
    total = 0.0
    for inside in filter(None, members):
        confidence = sum(c for c, _ in inside) / len(inside)
        accuracy = sum(hit for _, hit in inside) / len(inside)
        total += len(inside) / len(labels) * abs(confidence - accuracy)
    return total


@few
@CASES
def test_ece_is_its_definition(seed: int, rows: int, experts: int) -> None:
    logits, labels = case(seed, rows, experts)
    p = logits.softmax(-1)
    assert expected_calibration_error(p, labels) == pytest.approx(brute_force_ece(p, labels, BINS), abs=1e-12)
    assert expected_calibration_error(p, labels, bins=4) == pytest.approx(brute_force_ece(p, labels, 4), abs=1e-12)


def test_ece_of_known_routers() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    sure_and_right = functional.one_hot(labels, 2).double()
    assert expected_calibration_error(sure_and_right, labels) == 0  # confidence 1 falls into the last bin
    assert expected_calibration_error(sure_and_right.flip(-1), labels) == 1  # sure and wrong
    undecided = torch.full((4, 2), 0.5)
    assert expected_calibration_error(undecided, torch.tensor([0, 0, 1, 1])) == 0  # right half of the time, as it says
    overconfident = torch.tensor([[0.9, 0.1]] * 4)
    assert expected_calibration_error(overconfident, labels) == pytest.approx(0.4)


@few
@CASES
def test_metrics_agree_with_scikit_learn(seed: int, rows: int, experts: int) -> None:
    logits, labels = case(seed, rows, experts)
    p, every = logits.softmax(-1).numpy(), list(range(experts))
    figures = router_metrics(logits, labels)
    assert figures["accuracy"] == pytest.approx(metrics.accuracy_score(labels, p.argmax(-1)))
    assert figures["nll"] == pytest.approx(metrics.log_loss(labels, p, labels=every))
    one_against_rest = [metrics.brier_score_loss(labels == e, p[:, e], pos_label=True) for e in every]
    assert figures["brier"] == pytest.approx(sum(one_against_rest))
    assert figures["ece"] == pytest.approx(brute_force_ece(logits.softmax(-1), labels, BINS))


@few
@CASES
def test_confusion_agrees_with_scikit_learn(seed: int, rows: int, experts: int) -> None:
    logits, labels = case(seed, rows, experts)
    expected = metrics.confusion_matrix(labels, logits.argmax(-1), labels=range(experts))
    assert np.array_equal(confusion(logits, labels), expected)


@few
@given(seed=st.integers(0, 10_000), sharpness=st.floats(0.3, 6.0))
def test_no_other_temperature_has_a_lower_nll(seed: int, sharpness: float) -> None:
    logits, labels = case(seed, 200, 4, sharpness)
    labels = torch.where(
        torch.rand(200, generator=torch.Generator().manual_seed(seed)) < 0.6, logits.argmax(-1), labels
    )
    best = float(functional.cross_entropy(logits / fit_temperature(logits, labels), labels))
    for log_t in np.linspace(-4, 4, 81):
        assert best <= float(functional.cross_entropy(logits / math.exp(log_t), labels)) + 1e-6


@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(truth: float) -> None:
    """Labels drawn from softmax(logits / truth): that is the calibrated router."""
    logits, _ = case(0, 20_000, 4)
    labels = torch.multinomial((logits / truth).softmax(-1), 1, generator=torch.Generator().manual_seed(1)).squeeze(-1)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(truth, rel=0.05)
    assert router_metrics(logits / found, labels)["ece"] < 0.02


@few
@given(seed=st.integers(0, 10_000), sharpness=st.floats(0.3, 6.0))
def test_no_other_temperature_makes_a_gate_of_needs_likelier(seed: int, sharpness: float) -> None:
    logits, labels = case(seed, 200, 4, sharpness)
    needed = functional.one_hot(labels, 4)[:, 1:].double()

    def nll(t: float) -> float:
        odds = (logits[:, 1:] - logits[:, :1]).double() / t
        return float(functional.binary_cross_entropy_with_logits(odds, needed))

    best = nll(fit_temperature(logits, labels, "needs"))
    for log_t in np.linspace(-4, 4, 81):
        assert best <= nll(math.exp(log_t)) + 1e-6


@few
@given(seed=st.integers(0, 10_000), scale=st.floats(0.5, 2.0))
def test_logits_that_are_scaled_have_a_temperature_scaled_alike(seed: int, scale: float) -> None:
    logits, _ = case(seed, 300, 4)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale * fit_temperature(logits, labels), rel=1e-3)


def test_single_precision_logits_suffice() -> None:
    logits, labels = case(3, 500, 4)
    assert fit_temperature(logits.float(), labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-4)
    for name, figure in router_metrics(logits.float(), labels).items():
        assert figure == pytest.approx(router_metrics(logits, labels)[name], abs=1e-5)


def test_a_router_that_is_always_right_gets_the_lowest_temperature_it_may() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    found = fit_temperature(functional.one_hot(labels, 4).float(), labels)
    assert 0 < found < 0.05
    assert math.isfinite(router_metrics(functional.one_hot(labels, 4) / found, labels)["nll"])
