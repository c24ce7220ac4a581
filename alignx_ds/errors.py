"""Errors that a user can fix, and what their messages may show. Programming errors are assertions.

A message quotes the user's data and settings, so it is cut to one line and keys and passwords are removed from it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

EXIT_CODE = 2
EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: try again
EXIT_INTERRUPTED = 130  # by Ctrl-C, as shells say it
SHOWN = 300  # characters of what was given
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "ALIGNX_API_KEY")
SHORTEST = 8  # what is shorter in such a variable is a stand-in like "none", and would be found in common words
HIDDEN = "***"
MESSAGE = "alignx-ds: error: "  # how each line of an error starts on the console
LOOKS = re.compile(
    r"(?P<before>\b[A-Za-z][A-Za-z0-9+.-]*://)[^/\s]+(?=@)"  # https://user:password@host
    r"|(?P<name>[?&][\w-]*(?i:key|token|secret|password)=)[^&\s'\"]+"  # ?api_key=…
    r"|\bhf_[A-Za-z0-9]{30,}"  # the hub's own
    r"|\bsk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}"  # OpenAI's
)


def redact(text: str) -> str:
    """The text without the secrets of this environment, and without what looks like one."""
    for name in VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return LOOKS.sub(lambda found: f"{found['before'] or found['name'] or ''}{HIDDEN}", text)


def holds_secret(text: str) -> bool:
    return redact(text) != text


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
    """One thing that is wrong with the input: where, what was given, what is allowed, and the fix."""

    key: str
    given: object
    allowed: str
    fix: str

    def __str__(self) -> str:
        given = repr(self.given)
        given = given if len(given) <= SHOWN else f"{redact(given)[:SHOWN]}…"
        return presentable(f"{self.key}: got {given}, expected {self.allowed}; {self.fix}")


class UserError(Exception):
    """Something that the user can fix. The CLI prints it without a traceback and exits with code 2."""


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

    def __init__(self, where: str, code: int = EXIT_STOPPED) -> None:
        super().__init__(where)
        self.code = code
