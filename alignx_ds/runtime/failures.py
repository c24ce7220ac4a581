"""What the console is told of an exception: what a user can fix in a line, anything else with its traceback."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from types import TracebackType

import torch

from alignx_ds.errors import EXIT_CODE, UserError
from alignx_ds.runtime.lifeline.failure import Failure

CRASHED, INTERRUPTED = 1, 130
PACKAGE = Path(__file__).parents[1]
NO_MEMORY = re.compile("can't allocate memory|cannot allocate memory", re.IGNORECASE)  # torch's on CPUs: a RuntimeError
NO_ANSWER = re.compile("timed out waiting|wait timeout|timed out after", re.IGNORECASE)  # gloo's, and the store's
LESS_MEMORY = "raise train.accumulation or align.accumulation, lower evaluation.batch, or start more ranks"


def failure_of(error: BaseException, timeout: int) -> Failure:
    """`timeout`: seconds that a collective may take."""
    if isinstance(error, UserError):
        return Failure(str(error), EXIT_CODE)
    said = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return Failure("interrupted", INTERRUPTED)
    if _is_out_of_memory(error):
        return Failure(
            f"out of memory {_place(error.__traceback__)}: {said or 'no more to be had'}; {LESS_MEMORY}", CRASHED
        )
    message = f"{type(error).__name__}: {said}"
    if isinstance(error, RuntimeError) and NO_ANSWER.search(said):
        message += (
            f"\na rank did not answer within launch.timeout={timeout} seconds: stuck, or far slower than the others"
        )
    return Failure(message, CRASHED, "".join(traceback.format_exception(error)))


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def _place(trace: TracebackType | None) -> str:
    """The innermost of our own functions; of a script that only uses them, its innermost."""
    frames = traceback.extract_tb(trace)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)] or frames
    if not own:
        return "at an unknown place"
    return f"in {own[-1].name} ({Path(own[-1].filename).name}, line {own[-1].lineno})"
