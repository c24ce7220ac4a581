"""The standard streams as users leave them: closed, in ASCII, or a pipe that nothing reads any more."""

from __future__ import annotations

import codecs
import io
import logging
import os
import select
import sys

PLAIN = str.maketrans(
    {"×": "x", "–": "-", "—": "-", "−": "-", "…": "...", "·": "*", "→": "->", "≥": ">=", "≤": "<=", "±": "+-", "’": "'"}
)  # what the console's own text has beyond ASCII
DEGRADED = "alignx_ds.degraded"  # the error handler's name


def prepare() -> None:
    """Make all three usable, so that nothing printed fails: a character that can't be encoded is replaced or escaped.

    The first call of a program: files that it opens must not take a closed stream's number.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest free number
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")  # None when it was closed
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")
    codecs.register_error(DEGRADED, _degraded)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=DEGRADED)
    logging.raiseExceptions = False  # libraries that log to a closed pipe; otherwise they print a traceback each time


def nothing_reads_output() -> bool:
    """Whether nothing reads the standard output any more, as after `| head`."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # errors and hang-ups are reported in any case
    return bool(output.poll(0))


def finish() -> None:
    """Drop what can't be written any more, so that Python's own flush at exit does not fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _degraded(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end
