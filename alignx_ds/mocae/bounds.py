"""Which values a field of a settings dataclass may take, declared in its type: `rank: NonNegativeInt = 64`.

`config.bounds` reports what violates them; type checkers and OmegaConf see the plain type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Finite numbers between two ends; `above` and `below` exclude theirs. `fix` replaces "raise it" or "lower it"."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    fix: str = ""

    def too_low(self, value: float) -> bool:
        return (self.least is not None and value < self.least) or (self.above is not None and value <= self.above)

    def too_high(self, value: float) -> bool:
        return (self.most is not None and value > self.most) or (self.below is not None and value >= self.below)

    def __str__(self) -> str:
        ends = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {end:g}" for words, end in ends.items() if end is not None)


@dataclass(frozen=True)
class OneOf:
    """One of a few texts."""

    choices: tuple[str, ...]


PositiveInt = Annotated[int, Range(least=1)]
NonNegativeInt = Annotated[int, Range(least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(least=0)]
