"""How a process ends at once. An ordinary exit tears down the process group, which waits for the other ranks."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn

WRITE_LIMIT = 2.0  # seconds; a terminal that accepts no output must not keep the process alive


def exit_now(code: int, text: str = "") -> NoReturn:
    """Write the text to stderr, flush, and end the process without running exit handlers or destructors."""
    try:
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
