"""What one forward pass knows about its queries, shared by the AlignX layers of a model.

Shapes: B rows, T tokens, d hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignx_ds.mocae.fused import Pick
from alignx_ds.mocae.gate import Decision, Query
from alignx_ds.mocae.kernels import Tables
from alignx_ds.mocae.output_calibration import Pull

SUMMARIES = 4  # hidden sizes that a query's summary takes


@dataclass
class Routing:
    """Per-instance routing: decided once from the prompt, kept with the KV cache, reused while decoding."""

    prompt_mask: Tensor  # [B, T] 1 on the prompt's tokens, 0 on padding and on the answer
    words: Tensor  # [B, E] what the lexicon says of the prompt
    forced: Tensor | None = None  # [B, E] gates that overrule every gate (tests, teacher-forced passes)
    decisions: dict[int, Decision] = field(default_factory=dict)  # by the layer that owns the gate
    queries: dict[int, Query] = field(default_factory=dict)  # what each gate saw
    picks: dict[int, list[Pick]] = field(default_factory=dict)  # by layer: the rows' own factors, where they are few
    pulls: dict[int, list[Pull]] = field(default_factory=dict)  # by layer: what the gates fix of its calibration, once
    experts: dict[int, Tensor] = field(default_factory=dict)  # by gate: [B] int32, the only expert of each row
    tables: dict[int, list[Tables]] = field(default_factory=dict)  # by layer: its calibration under each expert

    def __post_init__(self) -> None:
        """`forced_count`: how many experts have a gate in a row of forced gates. Asked of the device once."""
        self.forced_count = None if self.forced is None else int((self.forced > 0).sum(-1).max())


@dataclass
class Channel:
    """How the model hands the routing of the pass under way to its layers, whose signature the backbone fixes."""

    routing: Routing | None = None
    token_mask: Tensor | None = None  # [B, T] 0 on padding


def prompt_summary(h: Tensor, prompt_mask: Tensor) -> Tensor:
    """A query as a gate sees it: mean, largest, smallest and last hidden state over the prompt's tokens, fp32.

    h [B, T, d], prompt_mask [B, T] -> [B, 4d]. The mean alone routes worse (docs/results.md).
    """
    inside, h = prompt_mask.to(h.device).bool(), h.float()
    places = torch.arange(h.shape[1], device=h.device)
    last_place = (places * inside).amax(1)[:, None, None].expand(-1, -1, h.shape[-1])
    last = h.gather(1, last_place)
    filled = torch.where(inside.unsqueeze(-1), h, last)  # a state of the prompt changes neither extreme
    mean = (inside.unsqueeze(1).float() @ h).squeeze(1) / inside.sum(1, keepdim=True).clamp_min(1)
    return torch.cat([mean, filled.amax(1), filled.amin(1), last.squeeze(1)], dim=-1)
