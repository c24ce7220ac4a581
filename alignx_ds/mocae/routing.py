"""What one forward pass knows about its queries, shared by the AlignX layers of a model.

Shapes: B rows, T tokens, d hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from alignx_ds.mocae.gate import Decision


@dataclass
class Routing:
    """Per-instance routing: decided once from the prompt, kept with the KV cache, reused while decoding."""

    prompt_mask: Tensor  # [B, T] 1 on the prompt's tokens, 0 on padding and on the answer
    forced: Tensor | None = None  # [B, E] gates that overrule every gate (tests, teacher-forced passes)
    decisions: dict[int, Decision] = field(default_factory=dict)  # by the layer that owns the gate
    queries: dict[int, Tensor] = field(default_factory=dict)  # [B, d] what each gate saw


@dataclass
class Channel:
    """How the model hands the routing of the pass under way to its layers, whose signature the backbone fixes."""

    routing: Routing | None = None
    token_mask: Tensor | None = None  # [B, T] 0 on padding


def prompt_mean(h: Tensor, prompt_mask: Tensor) -> Tensor:
    """Mean of the hidden states over the prompt's tokens, in fp32: h [B, T, d], prompt_mask [B, T] -> [B, d]."""
    weight = prompt_mask.to(h.device).float().unsqueeze(-1)
    return (h.float() * weight).sum(1) / weight.sum(1).clamp_min(1.0)
