"""What the doctor reports about one thing on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 2**30
Grade = Literal["ok", "–", "warn", "fail"]  # "–": an optional part is missing; runs that do not need it are fine


@dataclass(frozen=True)
class Finding:
    """What was examined and what was found; for anything but "ok" also what to do about it."""

    what: str
    grade: Grade
    seen: str
    fix: str = ""

    def line(self) -> str:
        return f"{self.grade:<5} {self.what}: {self.seen}{f' -> {self.fix}' if self.fix else ''}"
