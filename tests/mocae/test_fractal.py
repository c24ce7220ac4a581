"""The fractal calibrator against brute force, power laws, sets of known dimension and autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import generator, random_geometry, relative
from torch import Tensor

from alignx_ds.mocae.fractal import MeanShift, fractal_score, local_dimension, log_mass


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.integers(0, 1000))
def test_log_mass_is_the_mean_kernel(f: int, anchors: int, experts: int, seed: int) -> None:
    source = generator(seed)
    z = torch.randn(2, 3, f, generator=source)
    points = torch.randn(experts, anchors, f, generator=source)
    scales = torch.tensor([0.5, 1.0, 3.0])
    mass = log_mass(z, points, scales)
    assert mass.shape == (2, 3, experts, 3)
    for index in np.ndindex(2, 3, experts, 3):
        b, t, e, s = index
        kernels = [
            math.exp(-0.5 * float((z[b, t] - a).double().square().sum()) / float(scales[s]) ** 2) for a in points[e]
        ]
        assert float(mass[index]) == pytest.approx(math.log(sum(kernels) / anchors), rel=1e-4, abs=1e-4)


def test_log_mass_is_finite_far_away_and_zero_on_the_anchor() -> None:
    point = torch.tensor([[[3.0, -4.0]]])
    scales = torch.tensor([0.1])
    assert float(log_mass(point[0], point, scales)) == pytest.approx(0.0, abs=1e-3)
    assert float(log_mass(torch.tensor([103.0, -4.0]), point, scales)) == pytest.approx(-0.5e6, rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 8), st.floats(-5, 5), st.integers(2, 7))
def test_the_slope_of_a_power_law_is_its_exponent(exponent: float, offset: float, count: int) -> None:
    scales = 0.1 * 2.0 ** torch.arange(count, dtype=torch.float64)
    assert float(local_dimension(offset + exponent * scales.log(), scales)) == pytest.approx(exponent, rel=1e-6)


def test_the_slope_is_the_least_squares_one() -> None:
    scales = torch.tensor([0.1, 0.3, 0.4, 1.0, 2.5])
    mass = -torch.rand(6, 5, generator=generator(0))
    expected = [np.polyfit(scales.log().double().numpy(), row.double().numpy(), 1)[0] for row in mass]
    np.testing.assert_allclose(local_dimension(mass, scales).numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_a_filled_cube_has_its_own_dimension(dimension: int) -> None:
    """Anchors fill a `dimension`-cube inside R^3; at scales well inside it, mass grows like scale ** dimension."""
    points = torch.zeros(1, 20000, 3)
    points[..., :dimension] = torch.rand(20000, dimension, generator=generator(1))
    centre = torch.zeros(3)
    centre[:dimension] = 0.5
    scales = torch.tensor([0.06, 0.08, 0.1, 0.12])
    assert float(local_dimension(log_mass(centre, points, scales), scales)) == pytest.approx(dimension, rel=0.08)


def test_the_score_is_mean_mass_less_the_mismatch_of_dimension() -> None:
    g = random_geometry(5, 2)
    z = torch.randn(7, 3, generator=generator(3))
    score = fractal_score(z, g.anchors, g.scales, g.dimensions)
    for e in range(4):
        mass = log_mass(z, g.anchors[e : e + 1], g.scales)[:, 0].double().numpy()
        slopes = np.array([np.polyfit(np.log(g.scales.double().numpy()), row, 1)[0] for row in mass])
        expected = mass.mean(-1) - np.abs(slopes - float(g.dimensions[e]))
        np.testing.assert_allclose(score[:, e].numpy(), expected, rtol=1e-4, atol=1e-5)


def fractal_step(z: Tensor, gates: Tensor, anchors: Tensor, scales: Tensor) -> Tensor:
    """The gated step: z [..., f], gates [..., E], anchors [E, M, f]."""
    shift = MeanShift.of(anchors, scales)
    gated = shift.weights(z) * gates.repeat_interleave(len(scales), dim=-1).unsqueeze(-1)
    return gated.flatten(-2) @ shift.back - z


def test_the_pull_of_one_scale_is_the_scaled_gradient_of_the_log_mass() -> None:
    g = random_geometry(5, 2)
    gates = torch.rand(7, 4, generator=generator(4)).softmax(-1)
    for scale in g.scales:
        z = torch.randn(7, 3, generator=generator(3), requires_grad=True)
        gated = (log_mass(z, g.anchors, scale[None])[..., 0] * gates).sum()
        (gradient,) = torch.autograd.grad(gated, z)
        step = fractal_step(z.detach(), gates, g.anchors, scale[None])
        assert relative(step, scale.square() * gradient) < 1e-4


def test_the_pull_of_many_scales_is_the_mean_of_theirs() -> None:
    g = random_geometry(5, 2)
    gates = torch.rand(2, 6, 4, generator=generator(4)).softmax(-1)
    z = torch.randn(2, 6, 3, generator=generator(3))
    single = [fractal_step(z, gates, g.anchors, scale[None]) for scale in g.scales]
    assert relative(fractal_step(z, gates, g.anchors, g.scales), torch.stack(single).mean(0)) < 1e-5
