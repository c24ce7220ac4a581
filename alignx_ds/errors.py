"""Errors that a user can mend. Programmer errors are assertions."""

from __future__ import annotations

from dataclasses import dataclass

EXIT_CODE = 2
SHOWN = 300  # characters of what was given


def one_line(text: str) -> str:
    """The text as one line that any terminal can show: what would break it, steer it or not encode is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the input: where, what was given, what is allowed, and the mend."""

    key: str
    given: object
    allowed: str
    mend: str

    def __str__(self) -> str:
        given = repr(self.given)
        given = given if len(given) <= SHOWN else f"{given[:SHOWN]}…"
        return one_line(f"{self.key}: got {given}, expected {self.allowed}; {self.mend}")


class UserError(Exception):
    """Something that the user can mend. The CLI prints it without a traceback and exits with code 2."""


class ConfigError(UserError):
    """A config that can't be run. Carries every problem found, not only the first."""

    def __init__(self, *problems: Problem) -> None:
        assert problems
        self.problems = problems
        super().__init__("\n".join(str(p) for p in problems))


class UnreachableError(UserError):
    """Something on the hub that could not be fetched; dry runs say so and go on."""


class DataError(UserError):
    """Data that can't be used; the message names the file, and the row and column where there is one."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))  # data is quoted in it
