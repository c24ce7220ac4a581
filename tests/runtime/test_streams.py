"""Standard streams as users leave them. No program of these tests imports torch, so each starts in a moment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
START = "import sys; from alignx_ds.runtime import streams; streams.prepare()\n"


def run(program: str, redirected: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = ["bash", "-c", f'exec "$0" -c "$1" {redirected}', sys.executable, START + program]
    outside = os.environ | {"PYTHONPATH": str(REPO)} | environment
    return subprocess.run(command, env=outside, capture_output=True, timeout=60, check=False)


def test_text_that_the_terminal_can_t_show_is_spelled_out() -> None:
    done = run("print('3 × ü – 5 %'); print('…ŷ', file=sys.stderr)", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"3 x \\xfc - 5 %\n", b"...\\u0177\n")
    done = run("print('3 × ü \\ud800')", PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stdout) == (0, "3 × ü \\ud800\n".encode())


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_file_of_ours(closed: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    program = f"file = open({str(file)!r}, 'w'); print('a'); print('b', file=sys.stderr); sys.exit(file.fileno() < 3)"
    assert run(program, closed).returncode == 0
    assert file.read_text() == ""


def test_output_that_can_t_be_written_is_dropped_at_the_end() -> None:
    done = run("sys.stdout.write('a'); streams.finish()", ">/dev/full", PYTHONUNBUFFERED="")
    assert (done.returncode, done.stderr) == (0, b"")
