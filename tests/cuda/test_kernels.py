"""The kernels for one expert a row give what PyTorch's own operators give, at shapes that fill no tile evenly."""

from __future__ import annotations

import pytest
import torch
from tiny_models import generator, random_geometry, relative
from torch import Tensor, nn

from alignx_ds.mocae import kernels
from alignx_ds.mocae.experts import PROJECTIONS, Factors, FeedForward
from alignx_ds.mocae.fused import FusedMixture
from alignx_ds.mocae.output_calibration import OutputCalibration

HIDDEN, FFN, RANK, LATENT = 200, 328, 24, 20
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
SHAPES = [(1, 1), (2, 1), (8, 1), (3, 37), (2, 300)]


class GELUTanh(nn.Module):
    """Has the name of transformers' class."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")


@pytest.fixture(autouse=True)
def _can_run(device: str) -> None:
    if kernels.triton is None or (device == "cpu" and not kernels.INTERPRETED):
        pytest.skip("Triton is not installed, or TRITON_INTERPRET=1 is not set")


def layer(device: str, dtype: torch.dtype, activation: nn.Module) -> FusedMixture:
    source = generator(1)

    def linear(n: int, m: int) -> nn.Linear:
        made = nn.Linear(n, m, bias=False)
        made.weight.data = torch.randn(m, n, generator=source) / n**0.5
        return made.to(device, dtype)

    base = FeedForward(linear(HIDDEN, FFN), linear(HIDDEN, FFN), linear(FFN, HIDDEN), activation)
    sizes = {p: (base.projection(p).in_features, base.projection(p).out_features) for p in PROJECTIONS}
    experts = [
        Factors(
            {p: torch.randn(RANK, n, generator=source) / n**0.5 for p, (n, _) in sizes.items()},
            {p: torch.randn(m, RANK, generator=source) / RANK**0.5 for p, (_, m) in sizes.items()},
        )
        for _ in range(4)
    ]
    return FusedMixture(base, experts).to(device)


@pytest.mark.parametrize("activation", [nn.SiLU(), GELUTanh()], ids=["silu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@torch.no_grad()
def test_the_mixture(device: str, dtype: torch.dtype, shape: tuple[int, int], activation: nn.Module) -> None:
    mixture = layer(device, dtype, activation)
    source = generator(2)
    x = torch.randn(*shape, HIDDEN, generator=source).to(device, dtype)
    chosen = torch.randint(0, 4, (shape[0],), generator=source)
    gates = nn.functional.one_hot(chosen, 4).float().unsqueeze(1).to(device)
    assert kernels.supported(x, gates, 1, activation)
    found = kernels.finished(mixture(x, kernels.Rows(chosen.int().to(device))))
    assert relative(found, mixture(x, gates, 1)) < LIMITS[dtype]
    alone = kernels.finished(mixture(x[-1:], kernels.Rows(chosen[-1:].int().to(device))))
    assert relative(alone, found[-1:]) < LIMITS[dtype]  # independent of its neighbours


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@torch.no_grad()
def test_the_output_calibration(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    calibration = OutputCalibration(random_geometry(LATENT, seed=3, d=HIDDEN), 0.6, 0.4).eval().to(device)
    source = generator(4)
    calibration.reinjection.copy_(0.3 * torch.randn(HIDDEN, LATENT, generator=source))
    mixture, x = layer(device, dtype, nn.SiLU()), torch.randn(*shape, HIDDEN, generator=source).to(device, dtype)
    chosen = torch.randint(0, 4, (shape[0],), generator=source)
    gates = nn.functional.one_hot(chosen, 4).float().unsqueeze(1).to(device)
    tables: list[kernels.Tables] = []
    found = calibration(mixture(x, kernels.Rows(chosen.int().to(device))), tables=tables)
    assert len(tables) == 1 and calibration.tables() is tables[0]
    y = mixture(x, gates, 1)
    assert relative(found, calibration(y, gates, count=1)) < LIMITS[dtype]
    assert relative(found, y) > 2 * LIMITS[dtype]  # it has an effect


@torch.no_grad()
def test_tables_follow_their_sources(device: str) -> None:
    calibration = OutputCalibration(random_geometry(LATENT, seed=3, d=HIDDEN), 0.6, 0.4).eval().to(device)
    first = calibration.tables()
    calibration.strengths.mul_(2)
    second = calibration.tables()
    assert torch.allclose(second.rest, 2 * first.rest) and calibration.tables() is second
    calibration.load_state_dict({n: t + 1 for n, t in calibration.state_dict().items()})
    assert not torch.allclose(calibration.tables().bias, second.bias)
