"""How a rank's process ends after its work."""

from __future__ import annotations

import subprocess
import sys

import pytest
from processes import REPO, cpu_environment

PROGRAM = """
import atexit
from alignx_ds.runtime import distributed
atexit.register(print, "exit handler")
print("work")
distributed.exit_rank(7)
"""


@pytest.mark.parametrize(("world_size", "output"), [("1", ["work", "exit handler"]), ("2", ["work"])])
def test_one_rank_of_several_ends_without_the_interpreter_s_teardown(world_size: str, output: list[str]) -> None:
    """What it has written is flushed; torn down, C++ threads that still run would abort it."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=REPO,
        env=cpu_environment(RANK="0", WORLD_SIZE=world_size),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()) == (7, output), done.stderr
