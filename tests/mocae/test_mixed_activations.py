"""The sum over experts with gradients: against autograd's own, in parts, with any activation, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import generator
from torch import Tensor
from torch.nn.functional import gelu, silu

from alignx_ds.mocae import mixed_activations as module
from alignx_ds.mocae.mixed_activations import mixed_activations

N, F, S, R, Q = 7, 5, 3, 2, 4
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(dtype: torch.dtype = torch.float64) -> Inputs:
    source = generator(0)
    shapes = ((N, F), (N, F), (N, 2, S, R), (2, S, R, F), (S, Q, F), (N, S + 1))
    made = [torch.randn(*shape, generator=source, dtype=dtype).requires_grad_() for shape in shapes]
    return made[0], made[1], made[2], made[3], made[4], made[5]


def by_autograd(given: Inputs, activation: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """As the formula says: Σᵢ gᵢ aᵢ and gᵢ D_d,i aᵢ."""
    gate, up, latent, up_in, down_out, weights = given
    mixed, outward = weights[:, :1] * activation(gate) * up, []
    for s in range(S):
        act = activation(gate + latent[:, 0, s] @ up_in[0, s]) * (up + latent[:, 1, s] @ up_in[1, s])
        mixed = mixed + weights[:, s + 1, None] * act
        outward.append(weights[:, s + 1, None] * (act @ down_out[s].T))
    return mixed, torch.stack(outward, dim=1)


@pytest.mark.parametrize("cached", [3 * F, 2**20], ids=["in_parts", "at_once"])
@pytest.mark.parametrize("activation", [silu, gelu, lambda x: x], ids=["silu", "gelu", "identity"])
def test_sums_and_gradients_are_autograd_s(
    monkeypatch: pytest.MonkeyPatch, activation: Callable[[Tensor], Tensor], cached: int
) -> None:
    """Seven tokens in parts of three are two whole ones and a rest."""
    monkeypatch.setattr(module, "CACHED", cached)
    given = inputs()
    before = [tensor.detach().clone() for tensor in given]
    source, found, expected = generator(1), mixed_activations(*given, activation), by_autograd(given, activation)
    seeds = [torch.randn(made.shape, generator=source, dtype=made.dtype) for made in expected]
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs)
    ours, autograds = (torch.autograd.grad(made, given, seeds) for made in (found, expected))
    for own, theirs in zip(ours, autograds, strict=True):
        torch.testing.assert_close(own, theirs)
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True)), "no input is overwritten"


def test_in_bf16_the_gradients_of_the_factors_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    source, parts = generator(0), {}
    shapes = ((4096, F), (4096, F), (4096, 2, S, R), (2, S, R, F), (S, Q, F), (4096, S + 1))
    given = [torch.rand(*shape, generator=source).bfloat16().requires_grad_() for shape in shapes]
    for cached in (8 * F, 2**20):
        monkeypatch.setattr(module, "CACHED", cached)
        mixed, outward = mixed_activations(*given, silu)
        parts[cached] = torch.autograd.grad(mixed.sum() + outward.sum(), given[3:5])
    for in_parts, at_once in zip(*parts.values(), strict=True):
        torch.testing.assert_close(in_parts, at_once, rtol=2**-7, atol=0)  # a bf16 number has 8 bits


def test_factors_that_are_not_trained_have_no_gradients() -> None:
    gate, up, latent, up_in, down_out, weights = inputs()
    frozen = (gate, up, latent.detach(), up_in.detach(), down_out.detach(), weights)
    mixed, _ = mixed_activations(*frozen, silu)
    mixed.sum().backward()
    assert up_in.grad is None and down_out.grad is None and latent.grad is None
    expected, _ = by_autograd((gate, up, latent, up_in, down_out, weights), silu)
    (d_weights,) = torch.autograd.grad(expected.sum(), weights)
    torch.testing.assert_close(weights.grad, d_weights)


def test_it_keeps_the_base_s_activations_and_no_expert_s() -> None:
    given, kept = inputs(torch.float32), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mixed_activations(*given, silu)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in given}
