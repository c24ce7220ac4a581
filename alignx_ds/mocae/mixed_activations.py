"""Σᵢ gᵢ aᵢ over all experts with gradients: what training keeps for its backward pass, and how it goes through memory.

Autograd would keep four tensors of activations for every expert. Here the backward pass computes them again from the
base FFN's two, which all experts share, and both passes take a part of the tokens at a time. On a CPU its activations
fit the cache, because most of the time goes into reading and writing them; elsewhere they bound what is there at once.

Shapes: N tokens, f FFN size, S specialists, E = S + 1 experts with the generalist, r and q ranks of their changes of
the gate and up projections, and of the down projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
CACHED = 2**18  # numbers of a tensor of activations on a CPU: 1 MiB in fp32, so that a few fit the cache of a core
AT_ONCE = 2**26  # elsewhere: 128 MiB in bf16


def mixed_activations(
    gate: Tensor, up: Tensor, latent: Tensor, up_in: Tensor, down_out: Tensor, weights: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Σᵢ gᵢ aᵢ [N, f], the generalist's included, and gᵢ D_d,i aᵢ of every specialist, [N, S, q].

    `gate`, `up` [N, f] are the base FFN's pre-activations, `latent` [N, 2, S, r] those of the specialists' changes,
    `up_in` [2, S, r, f] and `down_out` [S, q, f] their factors (fused.FusedMixture), `weights` [N, E] the gates; all of
    one dtype, which is the result's too.
    """
    found: tuple[Tensor, Tensor] = _Mixed.apply(  # type: ignore[no-untyped-call]
        gate, up, latent, up_in, down_out, weights, activation
    )
    return found


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        latent: Tensor,
        up_in: Tensor,
        down_out: Tensor,
        weights: Tensor,
        activation: Activation,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(gate, up, latent, up_in, down_out, weights)
        ctx.activation = activation
        mixed, outward = torch.empty_like(gate), gate.new_empty(len(gate), *down_out.shape[:2])
        for part in _parts(gate):
            total = (activation(gate[part]) * up[part]).mul_(weights[part, :1])
            for s, down in enumerate(down_out):
                pre_gate = torch.addmm(gate[part], latent[part, 0, s], up_in[0, s])
                pre_up = torch.addmm(up[part], latent[part, 1, s], up_in[1, s])
                own, weight = pre_up.mul_(activation(pre_gate)), weights[part, s + 1, None]
                torch.mul(own @ down.T, weight, out=outward[part, s])
                total.addcmul_(own, weight)
            mixed[part] = total
        return mixed, outward

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_mixed, d_outward = grads
        gate, up, latent, up_in, down_out, weights = ctx.saved_tensors
        needed = dict(zip(("gate", "up", "latent", "up_in", "down_out", "weights"), ctx.needs_input_grad, strict=False))
        d_gate, d_up, d_latent = torch.empty_like(gate), torch.empty_like(up), torch.empty_like(latent)
        summed = torch.promote_types(gate.dtype, torch.float32)  # over many parts, too many for bf16
        d_up_in, d_down_out = torch.zeros_like(up_in, dtype=summed), torch.zeros_like(down_out, dtype=summed)
        d_weights = torch.empty_like(weights)
        for part in _parts(gate):
            whole = d_mixed[part]
            a, (g, u) = _derived(ctx.activation, gate[part], up[part], whole * weights[part, :1])
            d_weights[part, 0] = (a * up[part]).mul_(whole).sum(-1)
            for s, down in enumerate(down_out):
                pre_gate = torch.addmm(gate[part], latent[part, 0, s], up_in[0, s])
                pre_up = torch.addmm(up[part], latent[part, 1, s], up_in[1, s])
                weight = weights[part, s + 1, None]
                reached = torch.addmm(whole, d_outward[part, s], down)  # the gradient of the weighted activation
                a, (own_g, own_u) = _derived(ctx.activation, pre_gate, pre_up, reached * weight)
                act = pre_up.mul_(a)
                d_weights[part, s + 1] = reached.mul_(act).sum(-1)
                if needed["down_out"]:
                    d_down_out[s] += (d_outward[part, s] * weight).T @ act
                for p, (d_pre, total) in enumerate(((own_g, g), (own_u, u))):
                    total.add_(d_pre)
                    if needed["latent"]:
                        torch.mm(d_pre, up_in[p, s].T, out=d_latent[part, p, s])
                    if needed["up_in"]:
                        d_up_in[p, s] += latent[part, p, s].T @ d_pre
            d_gate[part], d_up[part] = g, u
        made = (d_gate, d_up, d_latent, d_up_in.to(up_in.dtype), d_down_out.to(down_out.dtype), d_weights)
        return *(grad if need else None for grad, need in zip(made, needed.values(), strict=True)), None


def _derived(activation: Activation, gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """activation(gate), and the gradients of activation(gate) * up with respect to both, from the product's."""
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        activated = activation(leaf)
    (d_gate,) = torch.autograd.grad(activated, leaf, grad * up)
    found = activated.detach()
    return found, (d_gate, grad.mul_(found))


def _parts(activations: Tensor) -> Iterator[slice]:
    """Of [N, f]: slices of the tokens."""
    tokens, width = activations.shape
    size = max(1, (CACHED if activations.device.type == "cpu" else AT_ONCE) // width)
    for start in range(0, tokens, size):
        yield slice(start, start + size)
