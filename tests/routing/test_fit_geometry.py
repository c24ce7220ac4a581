"""The fitted geometry against scikit-learn and the data that it was fitted on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from tiny_models import generator
from torch import Tensor

from alignx_ds.config.schema import GateConfig
from alignx_ds.errors import DataError
from alignx_ds.mocae.fractal import fractal_score, local_dimension, log_mass
from alignx_ds.mocae.gate import CalibratedGate, Query
from alignx_ds.mocae.geometry import Geometry
from alignx_ds.mocae.natural import natural_score
from alignx_ds.mocae.settings import GateSettings
from alignx_ds.routing.fit_geometry import Features, _sample, fit

D, K, NAMES = 16, 5, ["generalist", "helpful", "harmless"]
SETTINGS = GateConfig(latent=K, fractal_dimensions=3, anchors=8, granularity=0.2, scales=4)


def clusters(seed: int, sizes: tuple[int, ...] = (150, 120, 90)) -> Features:
    """Three classes whose means and covariances differ, away from the origin."""
    made = []
    for e, size in enumerate(sizes):
        shape = generator(50 + e)
        mean = 3 + 1.5 * torch.randn(D, generator=shape)
        root = torch.randn(D, D, generator=shape) * torch.logspace(0, -1, D)
        made.append(mean + torch.randn(size, D, generator=generator(seed + e)) @ root.T)
    return Features(made)


@pytest.fixture(scope="module")
def fitted() -> Geometry:
    return fit(clusters(1), clusters(20), K, SETTINGS, NAMES, seed=0)


def latents(g: Geometry, features: Features) -> list[Tensor]:
    return [(rows - g.centre) @ g.projection.T for rows in features.by_expert]


def test_the_latent_is_whitened(fitted: Geometry) -> None:
    z = torch.cat(latents(fitted, clusters(1))).double().numpy()
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(z.T), np.eye(K), atol=1e-3)


def test_of_one_class_the_latent_keeps_the_widest_directions() -> None:
    rows = clusters(1).by_expert[0]
    alone = Features([rows, torch.zeros(0, 0), torch.zeros(0, 0)])
    projection = fit(alone, alone, K, SETTINGS, NAMES, seed=0).projection
    variances = np.linalg.eigvalsh(np.cov(rows.double().numpy().T))[::-1][:K]
    np.testing.assert_allclose(projection.norm(dim=1).numpy(), variances**-0.5, rtol=1e-4)


def test_discriminative_directions_come_first_however_small_their_variance() -> None:
    source = generator(9)
    noise = torch.randn(300, D, generator=source) * torch.logspace(2, 0, D)
    labels = torch.arange(300) % 2
    noise[:, -1] = 6.0 * labels + 0.3 * torch.randn(300, generator=source)  # the narrowest direction but one tells all
    split = Features([noise[labels == 0], noise[labels == 1], torch.zeros(0, 0)])
    fitted = fit(split, split, K, SETTINGS, NAMES, seed=0)
    first = ((noise - fitted.centre) @ fitted.projection.T)[:, 0]
    assert abs(float(np.corrcoef(first.numpy(), labels.numpy())[0, 1])) > 0.95


def test_means_and_covariances_are_the_classes_own(fitted: Geometry) -> None:
    for e, z in enumerate(latents(fitted, clusters(1))):
        np.testing.assert_allclose(fitted.means[e].numpy(), z.mean(0).numpy(), atol=1e-4)
        sigma = LedoitWolf().fit(z.double().numpy()).covariance_
        whitener = fitted.whiteners[e].double().numpy()
        np.testing.assert_allclose(whitener @ sigma @ whitener.T, np.eye(K), atol=1e-3)
        assert float(fitted.log_volumes[e]) == pytest.approx(0.5 * np.linalg.slogdet(sigma)[1], abs=1e-3)


def test_the_natural_score_is_the_shrunk_gaussian_s(fitted: Geometry) -> None:
    unseen = latents(fitted, clusters(40))
    for e, z in enumerate(latents(fitted, clusters(1))):
        law = multivariate_normal(z.double().mean(0).numpy(), LedoitWolf().fit(z.double().numpy()).covariance_)
        score = natural_score(unseen[0], fitted.means, fitted.whiteners, fitted.log_volumes)[:, e]
        np.testing.assert_allclose(score.numpy(), law.logpdf(unseen[0].double().numpy()) / K, rtol=1e-3, atol=1e-3)


def test_the_anchors_are_the_centres_of_what_is_nearest_to_them(fitted: Geometry) -> None:
    assert fitted.anchors.shape == (3, 8, 3)
    for e, z in enumerate(latents(fitted, clusters(1))):
        leading = z[:, :3]
        nearest = torch.cdist(leading, fitted.anchors[e]).argmin(1)
        centres = torch.stack([leading[nearest == a].mean(0) for a in range(8)])
        assert float((centres - fitted.anchors[e]).abs().max()) < 0.05


def test_scales_are_dyadic_and_dimensions_the_classes_own(fitted: Geometry) -> None:
    np.testing.assert_allclose(fitted.scales.numpy(), [0.4, 0.8, 1.6, 3.2], rtol=1e-6)
    for e, z in enumerate(latents(fitted, clusters(1))):
        own = local_dimension(log_mass(z[:, :3], fitted.anchors[e : e + 1], fitted.scales)[:, 0], fitted.scales)
        assert float(fitted.dimensions[e]) == pytest.approx(float(own.mean()), rel=1e-3)


def test_the_scores_are_standardised_on_the_calibration_split(fitted: Geometry) -> None:
    z = torch.cat(latents(fitted, clusters(20)))
    fractal = fractal_score(z[:, :3], fitted.anchors, fitted.scales, fitted.dimensions)
    natural = natural_score(z, fitted.means, fitted.whiteners, fitted.log_volumes)
    for i, score in enumerate((fractal, natural)):
        standardised = (score - fitted.score_shift[i]) / fitted.score_scale[i]
        assert float(standardised.mean()) == pytest.approx(0, abs=1e-3)
        assert float(standardised.std()) == pytest.approx(1, abs=1e-3)


def test_the_calibrators_route_unseen_rows(fitted: Geometry) -> None:
    gate = CalibratedGate(fitted, GateSettings())
    right: dict[str, list[float]] = {"fractal": [], "natural": []}
    for e, rows in enumerate(clusters(60).by_expert):
        parts = gate.parts(Query(rows, torch.zeros(len(rows), 3)))
        for name, shares in right.items():
            shares.append(float((parts[name].argmax(-1) == e).float().mean()))
    assert np.mean(right["natural"]) > 0.95
    assert np.mean(right["fractal"]) > 0.7


def test_the_same_seed_gives_the_same_geometry(fitted: Geometry) -> None:
    again = fit(clusters(1), clusters(20), K, SETTINGS, NAMES, seed=0)
    assert all(torch.equal(t, again.tensors()[name]) for name, t in fitted.tensors().items())


def with_absent(features: Features, place: int) -> Features:
    rows = list(features.by_expert)
    return Features([*rows[:place], torch.zeros(0, 0), *rows[place:]])


@pytest.mark.parametrize("place", range(4))
def test_an_expert_without_rows_changes_nothing_for_the_others(fitted: Geometry, place: int) -> None:
    """Neither their own numbers nor the standardisation of the scores."""
    names = [*NAMES[:place], "absent", *NAMES[place:]]
    made = fit(with_absent(clusters(1), place), with_absent(clusters(20), place), K, SETTINGS, names, seed=0)
    others = [e for e in range(4) if e != place]
    assert made.present.tolist() == [float(e != place) for e in range(4)]
    assert fitted.present.tolist() == [1.0] * 3
    for name, tensor in fitted.tensors().items():
        of_expert = name in ("means", "whiteners", "log_volumes", "anchors", "dimensions", "present")
        found = made.tensors()[name]
        torch.testing.assert_close(found[others] if of_expert else found, tensor, rtol=1e-4, atol=1e-5)
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("place", [0, 2])
def test_a_fitted_gate_never_chooses_an_expert_without_rows(place: int) -> None:
    names = [*NAMES[:place], "absent", *NAMES[place:]]
    gate = CalibratedGate(
        fit(with_absent(clusters(1), place), with_absent(clusters(20), place), K, SETTINGS, names, 0), GateSettings()
    )
    far_away = 100 * torch.randn(200, D, generator=generator(9))
    for rows in (*clusters(60).by_expert, far_away):
        decision = gate(Query(rows, torch.zeros(len(rows), 4)))
        assert not decision.gates[:, place].any()
        assert torch.isfinite(decision.logits).all()


def test_the_calibration_split_may_lack_an_expert_that_was_fitted() -> None:
    calibration_rows = Features([*clusters(20).by_expert[:2], torch.zeros(0, 0)])
    made = fit(clusters(1), calibration_rows, K, SETTINGS, NAMES, seed=0)
    assert made.present.tolist() == [1.0] * 3
    assert all(torch.isfinite(t).all() for t in made.tensors().values())


@pytest.mark.parametrize(("sizes", "needed"), [((150, 7, 90), "8"), ((150, 1, 90), "8")])
def test_too_few_rows_are_refused(sizes: tuple[int, ...], needed: str) -> None:
    with pytest.raises(DataError, match=rf"helpful: {sizes[1]} rows .*give {needed}"):
        fit(clusters(1, sizes), clusters(20), K, SETTINGS, NAMES, seed=0)


def test_fewer_rows_than_latent_dimensions_are_refused() -> None:
    rows = Features([torch.randn(10, 64, generator=generator(e)) for e in range(3)])
    with pytest.raises(DataError, match="rows"):
        fit(rows, rows, 40, SETTINGS, NAMES, seed=0)


def test_a_class_within_few_dimensions_can_be_fitted() -> None:
    """Its rows are many and lie on a line: the covariance is singular and next to unshrunk."""
    wide = clusters(0).by_expert
    along = torch.linspace(-1, 1, 4000).unsqueeze(1) * torch.randn(D, generator=generator(3))
    narrow = wide[2][:1] + along
    features = Features([wide[0], wide[1], narrow])
    whiteners = fit(features, features, K, SETTINGS, NAMES, seed=0).whiteners
    assert torch.isfinite(whiteners).all()
    assert float(torch.linalg.matrix_norm(whiteners[2], 2)) < 100 * float(torch.linalg.matrix_norm(whiteners[0], 2))


def test_rows_that_give_one_token_each_give_every_position() -> None:
    """Otherwise thousands of rows would all give their first token, which is always the same."""
    mask = torch.tensor([0] * 3 + [1] * 12 + [0] * 2)
    taken = torch.cat([_sample(mask, 1, row) for row in range(24)]).tolist()
    assert sorted(taken) == sorted(list(range(3, 15)) * 2)
    assert len(_sample(mask, 5, 7)) <= 5 and len(_sample(mask, 99, 7)) == 12
