"""What is printed when a run fails: one line for what a user can fix, a traceback for anything else."""

from __future__ import annotations

import errno
import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from alignx_ds.errors import EXIT_CODE, EXIT_INTERRUPTED, MESSAGE, UserError, presentable
from alignx_ds.runtime.extras import missing_package

CRASHED = 1  # exit code
PACKAGE = Path(__file__).parents[1]
# On CPUs torch raises plain RuntimeErrors, which only their text tells apart.
OUT_OF_MEMORY = re.compile("can't allocate memory|cannot allocate memory|std::bad_alloc", re.IGNORECASE)
TIMED_OUT = re.compile("timed out waiting|wait timeout|timed out after", re.IGNORECASE)  # gloo's and the store's
LESS_MEMORY = "raise train.accumulation or align.accumulation, lower evaluation.batch, or start more ranks"


# What the machine refuses: permissions, room, a device or a file system that can't be written.
DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@dataclass(frozen=True)
class Failure:
    """Why a process ends with an error: the message to print, its exit code, and a traceback if it needs one."""

    message: str
    code: int
    traceback: str = ""

    def lines(self, prefix: str = "") -> str:
        """The message as printed: each of its lines is marked as an error."""
        return "".join(f"{MESSAGE}{prefix}{line}\n" for line in self.message.splitlines() or [""])


def failure_of(error: BaseException, timeout: int) -> Failure:
    """`timeout`: the seconds after which a collective gives up (launch.timeout)."""
    if isinstance(error, UserError):
        return Failure(str(error), EXIT_CODE)
    if missing := missing_package(error):
        return Failure(missing, EXIT_CODE)
    if isinstance(error, KeyboardInterrupt):
        return Failure("interrupted", EXIT_INTERRUPTED)
    if isinstance(error, OSError) and error.errno in DENIED:
        return Failure(denied(error), EXIT_CODE)
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        place = _innermost_function(error.__traceback__)
        return Failure(f"out of memory {place}: {text or 'an allocation failed'}; {LESS_MEMORY}", CRASHED)
    message = f"{type(error).__name__}: {text}"
    if isinstance(error, RuntimeError) and TIMED_OUT.search(text):
        message += (
            f"\na rank did not answer within launch.timeout={timeout} seconds: it hangs or is far slower than the "
            "others; raise launch.timeout if it is only slow"
        )
    return Failure(message, CRASHED, "".join(traceback.format_exception(error)))


def denied(error: Exception) -> str:
    """One line for a file that can't be read or written."""
    what = f"{getattr(error, 'filename', None) or 'the output'}: {getattr(error, 'strerror', None) or error}"
    return presentable(f"{what}; free disk space or correct the permissions, and give the same command again")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


def _innermost_function(trace: TracebackType | None) -> str:
    """The innermost function of this package, or of the script that uses it."""
    frames = traceback.extract_tb(trace)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)] or frames
    if not own:
        return "at an unknown place"
    return f"in {own[-1].name} ({Path(own[-1].filename).name}, line {own[-1].lineno})"
