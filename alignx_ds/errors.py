"""Errors that a user can mend. Programmer errors are assertions."""

from __future__ import annotations

from dataclasses import dataclass

from alignx_ds.secrets import redact

EXIT_CODE = 2
EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: try again
SHOWN = 300  # characters of what was given


def visible(text: str, kept: str = "") -> str:
    """What any terminal can show: what would break a line, steer the terminal or not encode is escaped.

    But for what is `kept`.
    """
    escaped = (c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)
    return "".join(escaped)


def presentable(message: str) -> str:
    """One line, without secrets."""
    return visible(redact(message))


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the input: where, what was given, what is allowed, and the mend."""

    key: str
    given: object
    allowed: str
    mend: str

    def __str__(self) -> str:
        given = repr(self.given)
        given = given if len(given) <= SHOWN else f"{redact(given)[:SHOWN]}…"
        return presentable(f"{self.key}: got {given}, expected {self.allowed}; {self.mend}")


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

    def __init__(self, message: str) -> None:
        super().__init__(presentable(message))


class DataError(UserError):
    """Data that can't be used; the message names the file, and the row and column where there is one."""

    def __init__(self, message: str) -> None:
        super().__init__(presentable(message))  # data is quoted in it


class Stopped(Exception):  # noqa: N818 - it is no error
    """A signal asked the run to end; what was under way is saved. The message says where it goes on."""
