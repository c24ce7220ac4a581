"""What serves a prompt: gates from needs, least gates, and what to do with a prompt that its gate is unsure of.

Shapes: ... any leading dimensions, E experts, A = E − 1 axes; the generalist is expert 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignx_ds.mocae.settings import ALL, GateSettings


def gates_of_needs(needs: Tensor) -> Tensor:
    """Needs r [..., A] in [0, 1] -> gates [..., E] ≥ 0 that sum to one: r / max(1, Σ r); the generalist has the rest.

    Needs of one in all, or less, are gates as they are. More than that share a prompt: two whole needs have ½ each.
    The mean of the needed experts' differences from the base serves better than their sum (docs/results.md).
    """
    total = needs.sum(-1, keepdim=True)
    return torch.cat([(1 - total).clamp_min(0), needs / total.clamp_min(1)], dim=-1)


@dataclass(frozen=True)
class ServingRules:
    """A user's rules, applied to the gates of a choice or to needs when they serve, not in training.

    First, where the confidence is below `below`, the expert `unsure` serves alone, or with ALL every axis that has
    queries to the same share. Then every axis gets its floor: in needs its need is at least that; in a choice the
    floors are set aside and the rest is divided as before.
    """

    floors: tuple[float, ...] = ()  # by expert; empty: none
    unsure: int | str | None = None  # an expert's id, or ALL
    below: float = 0.0

    @classmethod
    def of(cls, settings: GateSettings, floors: Mapping[str, float], experts: Sequence[str]) -> ServingRules:
        """From the settings and the axes' floors by name. Raises ValueError for what no recipe could have set."""
        if settings.unsure not in ("", ALL, *experts):
            raise ValueError(f"gate.unsure is {settings.unsure!r}")
        if wrong := [name for name, floor in floors.items() if name not in experts[1:] or not 0 <= floor <= 1]:
            raise ValueError(f"floors has {wrong[0]!r}: {floors[wrong[0]]!r}")
        unsure = settings.unsure if settings.unsure in ("", ALL) else experts.index(settings.unsure)
        by_expert = tuple(floors.get(name, 0.0) for name in experts) if any(floors.values()) else ()
        return cls(by_expert, None if unsure == "" else unsure, settings.unsure_below)

    def served_by(self, settings: GateSettings, experts: int) -> int:
        """How many gates of a query can be non-zero when it is served."""
        axes, floored = experts - 1, sum(floor > 0 for floor in self.floors)
        most = max(settings.chosen(experts), axes if self.unsure == ALL else 0) + floored
        return min(most, axes) + 1 if settings.kind == "needs" else min(most, experts)

    @property
    def change(self) -> bool:
        """Whether they can change anything."""
        return self.unsure is not None or bool(self.floors)

    def on_gates(self, gates: Tensor, confidence: Tensor, present: Tensor) -> Tensor:
        """Of a choice: gates [..., E], confidence [...], present [E], 1 for experts with queries -> gates [..., E].

        They sum to one. The host is not synchronised with the device.
        """
        if self.unsure is not None:
            instead = gates_of_needs(self._instead(present))
            gates = torch.where((confidence < self.below).unsqueeze(-1), instead.to(gates.dtype), gates)
        if not self.floors:
            return gates
        rest = 1 - sum(self.floors)
        columns = zip(gates.unbind(-1), self.floors, strict=True)
        return torch.stack([rest * gate + floor for gate, floor in columns], dim=-1)

    def on_needs(self, needs: Tensor, confidence: Tensor, present: Tensor) -> Tensor:
        """Of needs: needs [..., A] in [0, 1], and confidence and present as above -> needs [..., A] in [0, 1]."""
        if self.unsure is not None:
            instead = self._instead(present).to(needs.dtype)
            needs = torch.where((confidence < self.below).unsqueeze(-1), instead, needs)
        if not self.floors:
            return needs
        columns = zip(needs.unbind(-1), self.floors[1:], strict=True)
        return torch.stack([need.clamp_min(floor) for need, floor in columns], dim=-1)

    def _instead(self, present: Tensor) -> Tensor:
        """[A], the needs that serve where the gate is unsure."""
        if isinstance(self.unsure, int):
            one = torch.zeros_like(present)
            one[self.unsure] = 1.0
            return one[1:]
        return present[1:]
