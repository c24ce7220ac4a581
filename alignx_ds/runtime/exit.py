"""How a process ends at once. An ordinary exit tears down the process group, which waits for the other ranks."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

WRITE_LIMIT = 2.0  # seconds; a terminal that accepts no output must not keep the process alive

_remembered: list[Callable[[], None]] = []  # what is undone at the end of the process


def remember(undo: Callable[[], None]) -> None:
    """Have `exit_now` call this first. What ends in any other way undoes its work itself."""
    _remembered.append(undo)


def forget(undo: Callable[[], None]) -> None:
    if undo in _remembered:
        _remembered.remove(undo)


def exit_now(code: int, text: str = "") -> NoReturn:
    """Write the text to stderr, flush, and end the process without running exit handlers or destructors."""
    try:
        for undo in list(_remembered):
            with suppress(OSError):
                undo()
        write_stderr(text)
    finally:
        os._exit(code)


def write_stderr(text: str) -> None:
    """Flush stdout, then write the text to stderr. Gives up after WRITE_LIMIT seconds."""
    writer = threading.Thread(target=_write, args=(text,), daemon=True)
    writer.start()
    writer.join(WRITE_LIMIT)


def _write(text: str) -> None:
    for stream, content in ((sys.__stdout__, ""), (sys.__stderr__, text)):  # torch's exception hook swaps sys.stderr
        with suppress(OSError, ValueError, AttributeError):
            assert stream is not None
            stream.write(content)
            stream.flush()
