"""The routing of a model's prompts: decided in the first forward pass, kept with the KV cache, read by every layer.

Shapes: B rows, T tokens, d hidden size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignx_ds.mocae.fused import RowExpert
from alignx_ds.mocae.gate import Decision, Query
from alignx_ds.mocae.kernels import Tables
from alignx_ds.mocae.output_calibration import GatedStep

SUMMARIES = 4  # a prompt's summary has this many times the hidden size: mean, largest, smallest, last


@dataclass
class Routing:
    """What the AlignX layers know of a batch of prompts. Decided once per prompt, whatever is generated after it."""

    prompt_mask: Tensor  # [B, T] 1 on the prompt's tokens, 0 on padding and on the answer
    words: Tensor  # [B, E] fp32, the lexical scores of the prompt
    forced: Tensor | None = None  # [B, E] gates to use instead of every gate's decision
    # By the index of the decoder layer that holds the gate:
    queries: dict[int, Query] = field(default_factory=dict)
    decisions: dict[int, Decision] = field(default_factory=dict)
    experts: dict[int, Tensor] = field(default_factory=dict)  # [B] int32, the only expert of each row
    # By the index of the AlignX layer, while decoding: what its gates alone determine.
    gathered: dict[int, list[RowExpert]] = field(default_factory=dict)
    steps: dict[int, list[GatedStep]] = field(default_factory=dict)
    tables: dict[int, list[Tables]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """`forced_count`: the largest number of non-zero forced gates in a row. Read from the device only once."""
        self.forced_count = None if self.forced is None else int((self.forced != 0).sum(-1).max())


@dataclass
class ForwardPass:
    """What a model hands to its AlignX layers in a forward pass, since the backbone fixes the layers' signature."""

    routing: Routing | None = None
    token_mask: Tensor | None = None  # [B, T] 0 on padding


def prompt_summary(h: Tensor, prompt_mask: Tensor) -> Tensor:
    """Mean, largest, smallest and last hidden state over the prompt's tokens, which a gate sees as its query.

    h [B, T, d], prompt_mask [B, T] -> [B, 4d] fp32. Ours: the mean alone routes worse (docs/results.md).
    """
    inside, h = prompt_mask.to(h.device).bool(), h.float()
    places = torch.arange(h.shape[1], device=h.device)
    last_place = (places * inside).amax(1)[:, None, None].expand(-1, -1, h.shape[-1])
    last = h.gather(1, last_place)
    filled = torch.where(inside.unsqueeze(-1), h, last)  # a state of the prompt itself, so no extreme changes
    mean = (inside.unsqueeze(1).float() @ h).squeeze(1) / inside.sum(1, keepdim=True).clamp_min(1)
    return torch.cat([mean, filled.amax(1), filled.amin(1), last.squeeze(1)], dim=-1)
