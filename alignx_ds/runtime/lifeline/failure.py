"""What ends a job, how the console is told, and how a process ends that must not wait for anyone."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

KILLED = 1  # exit code of the others when a rank was killed


@dataclass(frozen=True)
class Failure:
    """What the console is told, a line per problem, and how the process ends."""

    message: str
    code: int
    traceback: str = ""  # printed by the rank itself

    def lines(self, who: str = "") -> str:
        return "".join(f"alignx-ds: error: {who}{line}\n" for line in self.message.splitlines() or [""])


def speak(words: str) -> None:
    """On the stream of errors; a terminal that takes nothing may not keep the process from ending."""

    def say() -> None:
        for stream, text in ((sys.__stdout__, ""), (sys.__stderr__, words)):  # torch's exception hook swaps sys.stderr
            with suppress(OSError, ValueError, AttributeError):
                assert stream is not None
                stream.write(text)
                stream.flush()

    speaking = threading.Thread(target=say, daemon=True)
    speaking.start()
    speaking.join(2.0)


def end(words: str, code: int) -> NoReturn:
    """At once: the clean-up of a process group waits for the other ranks."""
    try:
        speak(words)
    finally:
        os._exit(code)
