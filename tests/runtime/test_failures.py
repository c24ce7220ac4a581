"""What is printed of an exception, and with which exit code the process ends."""

from __future__ import annotations

import errno

import pytest
import torch

from alignx_ds.errors import UserError
from alignx_ds.runtime.failures import failure_of


def printed(error: BaseException) -> tuple[str, int, bool]:
    """The lines, the exit code, and whether there is a traceback."""
    failure = failure_of(error, 9)
    return failure.lines("rank 3: "), failure.code, bool(failure.traceback)


def test_out_of_memory_is_one_line_without_a_traceback() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(10**16)  # more than any machine has: torch on CPUs
    for error in (refused.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")):
        line, code, traceback = printed(error)
        assert line.startswith("alignx-ds: error: rank 3: out of memory ") and line.count("\n") == 1
        assert (code, traceback) == (1, False)


def test_users_errors_have_no_traceback_and_others_have() -> None:
    two_lines = "alignx-ds: error: rank 3: one\nalignx-ds: error: rank 3: two\n"
    assert printed(UserError("one\ntwo")) == (two_lines, 2, False)
    assert printed(KeyError("x")) == ("alignx-ds: error: rank 3: KeyError: 'x'\n", 1, True)
    assert printed(KeyboardInterrupt()) == ("alignx-ds: error: rank 3: interrupted\n", 130, False)


def test_what_the_machine_refuses_is_one_line() -> None:
    for error in (OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "Permission denied")):
        line, code, traceback = printed(error)
        assert line.startswith(f"alignx-ds: error: rank 3: the output: {error.strerror}; free disk space or correct ")
        assert (code, traceback) == (2, False)
    line, code, traceback = printed(FileNotFoundError(errno.ENOENT, "No such file or directory", "a"))
    assert (code, traceback) == (1, True), "a programming error"


def test_a_timeout_names_its_key() -> None:
    assert "within launch.timeout=9 seconds" in printed(RuntimeError("Timed out waiting 9000ms for recv"))[0]
