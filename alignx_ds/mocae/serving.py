"""What serves a prompt beside what its gate decides: least gates, and what to do with a prompt that it is unsure of.

Shapes: ... any leading dimensions, E experts, A = E − 1 axes; the generalist is expert 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignx_ds.mocae.settings import ALL, GateSettings


def with_generalist(needed: Tensor) -> Tensor:
    """The axes' gates of needs [..., A] -> [..., E]: the generalist has what is left to one, which may be negative."""
    return torch.cat([1 - needed.sum(-1, keepdim=True), needed], dim=-1)


@dataclass(frozen=True)
class ServingRules:
    """A user's rules, applied to the gates of a decision when it serves, not in training.

    First, where the confidence is below `below`, the expert `unsure` serves alone, or with ALL every axis that has
    queries to the same share. Then every axis gets its floor: in needs its gate is at least that, and the generalist
    keeps what is left to one; in a choice the floors are set aside and the rest is divided as before.
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

    def __call__(self, gates: Tensor, confidence: Tensor, present: Tensor, kind: str) -> Tensor:
        """gates [..., E], confidence [...], present [E], 1 for experts with queries -> gates [..., E] that sum to one.

        The host is not synchronised with the device.
        """
        if self.unsure is not None:
            gates = torch.where((confidence < self.below).unsqueeze(-1), self._instead(gates, present), gates)
        if not self.floors:
            return gates
        columns = list(zip(gates.unbind(-1), self.floors, strict=True))
        if kind == "needs":
            axes = torch.stack([gate.clamp_min(floor) for gate, floor in columns[1:]], dim=-1)
            return with_generalist(axes)
        rest = 1 - sum(self.floors)
        return torch.stack([rest * gate + floor for gate, floor in columns], dim=-1)

    def _instead(self, gates: Tensor, present: Tensor) -> Tensor:
        """[..., E], what serves where the gate is unsure."""
        instead = torch.zeros_like(gates)
        if isinstance(self.unsure, int):
            instead[..., self.unsure] = 1.0
        else:
            axes = present[1:].to(gates.dtype)
            instead[..., 1:] = axes / axes.sum().clamp_min(1)
            instead[..., 0] = 1 - instead[..., 1:].sum(-1)
        return instead
