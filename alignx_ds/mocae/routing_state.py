"""The routing of a model's prompts: decided at every user turn, kept with the KV cache, read by every layer.

Shapes: B rows, T tokens, d hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar
from weakref import ref

import torch
from torch import Tensor

from alignx_ds.mocae.fused import RowExpert
from alignx_ds.mocae.gate import Decision, Query
from alignx_ds.mocae.grouped import Groups
from alignx_ds.mocae.kernels import Rows, Tables
from alignx_ds.mocae.output_calibration import GatedStep
from alignx_ds.mocae.recomputation import Contexts, contexts

PerRow = TypeVar("PerRow", Query, Decision)
SUMMARIES = 4  # a prompt's summary has this many times the hidden size: mean, largest, smallest, last


class Counts(NamedTuple):
    """Upper bounds, for every row of a batch."""

    gates: int  # of the gates that are not zero
    axes: int  # of those among them that are not the generalist's

    @classmethod
    def read(cls, gates: Tensor) -> Counts:
        """Of gates [B, E]; the host waits for the device."""
        used = gates != 0
        return cls(*torch.stack([used.sum(-1).max(), used[:, 1:].sum(-1).max()]).tolist())


@dataclass
class Routing:
    """What the AlignX layers know of a batch of prompts. Decided once per user turn, whatever is generated after it."""

    query_mask: Tensor  # [B, T] 1 on the tokens of the prompt's last user turn, which the gates decide from
    words: Tensor  # [B, E] fp32, the lexical scores of these tokens
    forced: Tensor | None = None  # [B, E] gates to use instead of every gate's decision
    # By the index of the decoder layer that holds the gate:
    queries: dict[int, Query] = field(default_factory=dict)
    decisions: dict[int, Decision] = field(default_factory=dict)
    rows: dict[int, Rows] = field(default_factory=dict)  # where the Triton kernels run
    groups: dict[int, Groups] = field(default_factory=dict)  # where the rows are grouped by expert
    counts: dict[int, Counts] = field(default_factory=dict)
    # By the index of the AlignX layer, while decoding: what its gates alone determine.
    gathered: dict[int, list[RowExpert]] = field(default_factory=dict)
    steps: dict[int, list[GatedStep]] = field(default_factory=dict)
    tables: dict[int, list[Tables]] = field(default_factory=dict)
    # Where a pass continues a KV cache with a new user turn: [B] bool, the rows that have one, and what holds for the
    # others, by the gate's layer.
    asked: Tensor | None = None
    earlier: dict[int, tuple[Query, Decision]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """`forced_counts`: those of the forced gates. Read from the device only once."""
        self.forced_counts = None if self.forced is None else Counts.read(self.forced)

    @classmethod
    def joined(cls, parts: Sequence[Routing]) -> Routing:
        """One routing for the rows of several prompts, in this order, that are decoded together from now on.

        Forced gates count as decided here, so that some rows may have them and others not. What the gates alone
        determine is computed anew. The host waits for the device.
        """
        first = parts[0]
        words = torch.cat([part.words for part in parts])
        made = cls(first.query_mask.new_ones(len(words), 1), words)
        for layer in first.decisions:
            decisions = [part.decisions[layer] for part in parts]
            gates = [
                d.gates if p.forced is None else p.forced.to(d.gates) for p, d in zip(parts, decisions, strict=True)
            ]
            logits = torch.cat([decision.logits for decision in decisions])
            made.decisions[layer] = replace(decisions[0], gates=torch.cat(gates), logits=logits)
            made.counts[layer] = Counts.read(made.decisions[layer].gates)
        return made

    def asked_again(self, query_mask: Tensor, words: Tensor, asked: Tensor) -> Routing:
        """The routing of a pass in which the rows `asked` [B] bool begin a user turn: the others' decisions stay.

        Nothing that the earlier gates determined is kept: counts, rows, groups, gathered factors, steps and tables.
        """
        earlier = {layer: (self.queries[layer], decision) for layer, decision in self.decisions.items()}
        words = torch.where(asked.unsqueeze(-1), words, self.words.to(words.device))
        return Routing(query_mask, words, self.forced, asked=asked, earlier=earlier)

    def decide(self, layer: int, query: Query, gate: Callable[[Query], Decision]) -> Decision:
        """Keep the query of the gate in this layer, and its decision; of rows that are not asked, the earlier ones."""
        decision = gate(query)
        if self.asked is not None:
            kept_query, kept_decision = self.earlier.pop(layer)
            query, decision = _rows(self.asked, query, kept_query), _rows(self.asked, decision, kept_decision)
        self.queries[layer], self.decisions[layer] = query, decision
        return decision

    def counted(self, layer: int, most: Counts, fixed: bool) -> Counts:
        """Of the gates that were decided in this layer: read once per decision, or `most` where that is not permitted.

        It is not while a step is compiled or captured. With `fixed` it is not either: steps that are compiled later
        would be compiled anew for every number.
        """
        if layer not in self.counts:
            gates = self.decisions[layer].gates
            capturing = torch.compiler.is_compiling() or (gates.is_cuda and torch.cuda.is_current_stream_capturing())
            self.counts[layer] = most if fixed or capturing else Counts.read(gates)
        return self.counts[layer]


def _rows(asked: Tensor, new: PerRow, kept: PerRow) -> PerRow:
    """The rows `asked` [B] of one and the other rows of the other, tensor by tensor."""

    def either(one: Tensor, other: Tensor) -> Tensor:
        rows = asked.to(one.device).view(-1, *[1] * (one.dim() - 1))
        return torch.where(rows, one, other.to(one.device))

    both = {f.name: (getattr(new, f.name), getattr(kept, f.name)) for f in fields(new)}
    changed: dict[str, Any] = {name: either(*pair) for name, pair in both.items() if isinstance(pair[0], Tensor)}
    return replace(new, **changed)


@dataclass
class ForwardPass:
    """What a model hands to its AlignX layers in a forward pass, since the backbone fixes the layers' signature."""

    routing: Routing | None = None
    token_mask: Tensor | None = None  # [B, T] 0 on padding
    tokens: Tensor | None = None  # [N] int64, where the flattened mask is not 0; None where there is no padding
    fixed: bool = False  # whether no shape may depend on what the gates decide

    def contexts(self) -> Contexts:
        """For activation checkpointing. A weak reference: the routing's decisions refer to what is to be recomputed."""
        assert self.routing is not None
        now = ref(self.routing)
        return contexts(lambda: now() is self.routing)


def unpadded(token_mask: Tensor | None) -> Tensor | None:
    """[B, T] -> [N] int64, the places of the tokens in the flattened mask; None where there is no padding.

    The host waits for the device.
    """
    if token_mask is None:
        return None
    places = token_mask.flatten().nonzero().squeeze(-1)
    return places if len(places) < token_mask.numel() else None


def prompt_summary(h: Tensor, query_mask: Tensor) -> Tensor:
    """Mean, largest, smallest and last hidden state over the tokens of a query (turns.py), which a gate sees.

    h [B, T, d], query_mask [B, T] -> [B, 4d] fp32. Ours: the mean alone routes worse (docs/results.md).
    """
    inside, h = query_mask.to(h.device).bool(), h.float()
    places = torch.arange(h.shape[1], device=h.device)
    last_place = (places * inside).amax(1)[:, None, None].expand(-1, -1, h.shape[-1])
    last = h.gather(1, last_place)
    filled = torch.where(inside.unsqueeze(-1), h, last)  # a state of the prompt itself, so no extreme changes
    mean = (inside.unsqueeze(1).float() @ h).squeeze(1) / inside.sum(1, keepdim=True).clamp_min(1)
    return torch.cat([mean, filled.amax(1), filled.amin(1), last.squeeze(1)], dim=-1)
