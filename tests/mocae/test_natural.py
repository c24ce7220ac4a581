"""The natural calibrator against scipy's Gaussians and autograd."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from tiny_models import generator, random_geometry, relative
from torch import Tensor

from alignx_ds.mocae.geometry import Geometry
from alignx_ds.mocae.natural import natural_score
from alignx_ds.mocae.output_calibration import OutputCalibration


def covariances(g: Geometry) -> Tensor:
    roots = torch.linalg.inv(g.whiteners.double())
    return roots @ roots.mT


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 1000), st.sampled_from([(4,), (2, 3), ()]))
def test_the_score_is_the_log_density_per_dimension(k: int, seed: int, leading: tuple[int, ...]) -> None:
    g = random_geometry(k, seed)
    z = 2 * torch.randn(*leading, k, generator=generator(seed + 1))
    score = natural_score(z, g.means, g.whiteners, g.log_volumes)
    assert score.shape == (*leading, g.num_experts)
    for e, sigma in enumerate(covariances(g)):
        expected = multivariate_normal(g.means[e].double().numpy(), sigma.numpy()).logpdf(z.double().numpy()) / k
        np.testing.assert_allclose(score[..., e].numpy(), np.asarray(expected), rtol=2e-4, atol=2e-4)


def test_the_pull_is_the_natural_gradient_of_the_log_density() -> None:
    g, k = random_geometry(6, 3), 6
    z = torch.randn(5, k, generator=generator(1), requires_grad=True)
    gates = torch.rand(5, 4, generator=generator(2)).softmax(-1)
    scores = natural_score(z, g.means, g.whiteners, g.log_volumes) * k
    expected = torch.zeros(5, k, dtype=torch.float64)
    for e, sigma in enumerate(covariances(g)):
        (gradient,) = torch.autograd.grad(scores[:, e].sum(), z, retain_graph=True)
        inverse_fisher = sigma  # the Fisher metric of a Gaussian's mean is the inverse of its covariance
        expected += gates[:, e : e + 1].double() * (gradient.double() @ inverse_fisher)
    in_place = replace(g, centre=torch.zeros(k), projection=torch.eye(k))  # the latent space is the hidden one
    calibration = OutputCalibration(in_place, fractal_weight=0.0, natural_weight=1.0)
    with torch.no_grad():
        calibration.reinjection.copy_(torch.eye(k))
        moved = calibration(z.detach().unsqueeze(1), gates.unsqueeze(1)).squeeze(1)
    assert relative(moved - z.detach(), expected) < 1e-4
