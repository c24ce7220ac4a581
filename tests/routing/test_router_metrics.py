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

from alignx_ds.routing.metrics import BINS, axis_metrics, confusion, expected_calibration_error, router_metrics
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


def laplace(right: int) -> float:
    """The rule of succession: the probability that the next one is right too."""
    return (right + 1) / (right + 2)


@few
@given(seed=st.integers(0, 10_000), sharpness=st.floats(0.3, 6.0))
def test_no_other_temperature_has_a_lower_nll(seed: int, sharpness: float) -> None:
    logits, labels = case(seed, 200, 4, sharpness)
    labels = torch.where(
        torch.rand(200, generator=torch.Generator().manual_seed(seed)) < 0.6, logits.argmax(-1), labels
    )
    counts = labels.bincount(minlength=4).tolist()
    own = [laplace(counts[c]) for c in labels.tolist()]
    targets = torch.tensor(
        [[p if e == c else (1 - p) / 3 for e in range(4)] for p, c in zip(own, labels.tolist(), strict=True)]
    )

    def nll(t: float) -> float:
        return float(-(targets * (logits / t).log_softmax(-1)).sum(-1).mean())

    best = nll(fit_temperature(logits, labels))
    for log_t in np.linspace(-4, 4, 81):
        assert best <= nll(math.exp(log_t)) + 1e-6


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
    for axis in needed.unbind(-1):  # Platt's targets
        positive = int(axis.sum())
        axis.copy_(torch.where(axis > 0, laplace(positive), 1 - laplace(200 - positive)))

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


@pytest.mark.parametrize("margin", [0.5, 20.0, 100.0])
@pytest.mark.parametrize("kind", ["choice", "needs"])
def test_a_router_that_is_always_right_is_no_surer_than_its_rows_allow(kind: str, margin: float) -> None:
    """The likelihood of the labels themselves would grow as long as the temperature falls."""
    labels = torch.arange(3).repeat(100) + 1
    logits = margin * functional.one_hot(labels, 4).double()
    logits[:, 0] = -margin if kind == "choice" else margin / 2  # in needs the generalist is the threshold
    found = logits / fit_temperature(logits, labels, kind)
    sure = found.softmax(-1) if kind == "choice" else (found[:, 1:] - found[:, :1]).sigmoid()
    assert float(sure.amax(-1).mean()) == pytest.approx(laplace(100), abs=0.005)


def test_experts_that_no_row_belongs_to_do_not_matter() -> None:
    logits, labels = case(5, 200, 3)
    for kind in ("choice", "needs"):
        padded = torch.cat([logits, torch.full((200, 1), -1e4, dtype=logits.dtype)], dim=-1)
        alone = torch.zeros(200, dtype=torch.int64)
        assert fit_temperature(padded, labels, kind) == pytest.approx(fit_temperature(logits, labels, kind), rel=1e-3)
        assert math.isfinite(fit_temperature(logits, alone, kind))


TWO_NEEDS = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
FORECASTS = torch.tensor([[0.8, 0.6], [0.3, 0.1], [0.9, 0.7], [0.2, 0.4]], dtype=torch.float64)


def odds_of(forecasts: Tensor) -> Tensor:
    """Logits of a gate of needs with these probabilities."""
    return torch.cat([torch.full((len(forecasts), 1), 2.5).double(), 2.5 + torch.logit(forecasts)], dim=-1)


def test_a_gate_of_needs_is_judged_axis_by_axis() -> None:
    logits = odds_of(FORECASTS)
    found = router_metrics(logits, TWO_NEEDS, "needs")
    assert found["accuracy"] == 0.5, "the first two sets are right, one has too much, the last too little"
    # axis 1 happens in rows 0 and 3, axis 2 in rows 0 and 2; every forecast has a bin of its own
    gaps = [[0.2, 0.3, 0.9, 0.8], [0.4, 0.1, 0.3, 0.4]]
    by_axis = axis_metrics(logits, TWO_NEEDS, "needs")
    assert [m["ece"] for m in by_axis] == pytest.approx([sum(g) / 4 for g in gaps])
    assert [m["brier"] for m in by_axis] == pytest.approx([sum(x * x for x in g) / 4 for g in gaps])
    assert found["ece"] == pytest.approx(sum(map(sum, gaps)) / 8)
    assert found["brier"] == pytest.approx(sum(x * x for g in gaps for x in g) / 8)
    assert found["nll"] == pytest.approx(-sum(math.log(1 - x) for g in gaps for x in g) / 8)
    # row 3 needs axis 1 and gets nothing; row 2 needs axis 2 and gets axis 1 too
    assert confusion(logits, TWO_NEEDS, "needs") == [[1, 0, 0], [1, 1, 0], [0, 1, 2]]


def test_a_choice_is_right_if_it_is_in_the_set() -> None:
    p = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4], [0.1, 0.8, 0.1]], dtype=torch.float64)
    found = router_metrics(p.log(), TWO_NEEDS)
    assert found["accuracy"] == 0.75
    assert found["ece"] == pytest.approx((0.4 + 0.7 + 0.6 + 0.2) / 4)
    assert found["brier"] == pytest.approx(((0.01 + 0.01 + 0.04) + (0.64 + 0.49 + 0.01) + 0.54 + 0.06) / 4)
    expected = -(0.5 * math.log(0.6 * 0.3) + math.log(0.2) + math.log(0.4) + math.log(0.8)) / 4
    assert found["nll"] == pytest.approx(expected)
    assert confusion(p.log(), TWO_NEEDS) == [[0, 1, 0], [0, 2, 0], [0, 1, 1]]
    assert axis_metrics(p.log(), TWO_NEEDS)[0]["brier"] == pytest.approx((0.16 + 0.49 + 0.09 + 0.04) / 4)


@few
@CASES
def test_one_hot_sets_have_the_metrics_of_their_labels(seed: int, rows: int, experts: int) -> None:
    logits, labels = case(seed, rows, experts)
    sets = functional.one_hot(labels, experts).float()
    assert router_metrics(logits, sets) == router_metrics(logits, labels)
    assert confusion(logits, sets) == confusion(logits, labels)
    assert fit_temperature(logits, sets) == fit_temperature(logits, labels)


def test_the_temperature_of_a_gate_of_needs_counts_every_axis() -> None:
    """Each axis is drawn by itself, so that sets of two come with the rest."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(20_000, 3, generator=generator, dtype=torch.float64) * 2
    odds = (logits[:, 1:] - logits[:, :1]) / 2
    axes = (torch.rand(odds.shape, generator=generator, dtype=torch.float64) < odds.sigmoid()).double()
    sets = torch.cat([(axes.sum(-1, keepdim=True) == 0).double(), axes], dim=-1)
    assert (sets.sum(-1) == 2).any()
    assert fit_temperature(logits, sets, "needs") == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("kind", ["choice", "needs"])
def test_a_temperature_of_weighed_rows_is_that_of_repeated_ones(kind: str) -> None:
    logits, labels = case(8, 300, 4)
    labels = torch.where(torch.rand(300, generator=torch.Generator().manual_seed(8)) < 0.5, logits.argmax(-1), labels)
    weights = torch.where(torch.arange(300) < 100, 2.0, 0.5)
    numbers = torch.tensor([i for i in range(300) for _ in range(4 if i < 100 else 1)])
    weighed = fit_temperature(logits, labels, kind, weights)
    assert weighed == pytest.approx(fit_temperature(logits[numbers], labels[numbers], kind), rel=0.03)
    assert abs(weighed / fit_temperature(logits, labels, kind) - 1) > 1e-3
