"""A fault of one rank ends all ranks within seconds, and the console names the rank. No launcher kills the others."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from plain_ranks import RanksResult, launch, start, wait_for_text

from alignx_ds.runtime.failures import LESS_MEMORY

WORKER = "tests/faults/nohang_worker.py"
PREFIX = "alignx-ds: error: "
LIMIT = 30.0  # seconds within which all have to end
ROW = "rows.jsonl, row 7: no column 'response'"


def worker(fault: str, where: str = "1", timeout: int = 60) -> list[str]:
    return [WORKER, fault, where, str(timeout)]


def errors(ended: RanksResult) -> list[str]:
    """The error lines on the console, after checking that all ranks have ended in time."""
    assert None not in ended.codes, f"still running: {ended}"
    assert ended.seconds < LIMIT
    return [line.partition(PREFIX)[2] for line in ended.console.splitlines() if PREFIX in line]


@pytest.fixture
def console(tmp_path: Path) -> Path:
    return tmp_path / "console.log"


@pytest.mark.tried("hang", "an exception on one rank", "all ranks end within 3 s; only its traceback is on the console")
def test_an_exception_ends_the_other_ranks_and_shows_its_traceback_only(console: Path) -> None:
    ended = start(worker("exception"), 2, console)
    assert errors(ended) == ["rank 1: ZeroDivisionError: boom at work"]
    assert ended.codes == [1, 1]
    assert ended.console.count("Traceback") == 1, "no traceback of errors that follow from it"


@pytest.mark.tried(
    "hang", "a data error on one of four ranks", "all end with code 2 and one line that names rank, file and row"
)
@pytest.mark.faults
def test_an_error_in_the_data_of_one_of_four_ranks(console: Path) -> None:
    ended = start(worker("data", "3"), 4, console)
    assert errors(ended) == [f"rank 3: {ROW}"]
    assert ended.codes == [2, 2, 2, 2]
    assert "Traceback" not in ended.console


@pytest.mark.tried("hang", "the same error on all ranks", "shown once")
@pytest.mark.faults
@pytest.mark.parametrize("fault", ["data", "bad-start"])
def test_an_error_of_all_ranks_is_shown_once(fault: str, console: Path) -> None:
    ended = start(worker(fault, "all"), 2, console)
    assert errors(ended) == [ROW]
    assert ended.codes == [2, 2]


@pytest.mark.tried("hang", "an error on one rank before the ranks are connected", "all end with code 2 and its line")
@pytest.mark.faults
def test_an_error_of_one_rank_before_it_is_connected(console: Path) -> None:
    ended = start(worker("bad-start"), 2, console)
    assert errors(ended) == [f"rank 1: {ROW}"]
    assert ended.codes == [2, 2]


@pytest.mark.tried(
    "hang", "out of memory on one rank", "all end, with one line that says where it was and what to change"
)
@pytest.mark.faults
def test_out_of_memory_says_where_and_what_to_change(console: Path) -> None:
    ended = start(worker("memory"), 2, console)
    (line,) = errors(ended)
    assert line.startswith("rank 1: out of memory in cause (nohang_worker.py, line ")
    assert "CUDA out of memory. Tried to allocate 2.00 GiB" in line and line.endswith(LESS_MEMORY)
    assert ended.codes == [1, 1]
    assert "Traceback" not in ended.console


@pytest.mark.tried("hang", "kill -9 of a rank in a collective", "the others end within 3 s and name it")
def test_a_killed_rank_ends_the_other_ranks(console: Path) -> None:
    ended = start(worker("kill"), 2, console)
    (line,) = errors(ended)
    assert line.startswith("rank 1: ended without an error message on host ") and line.endswith(
        "killed, or out of memory"
    )
    assert ended.codes == [1, -signal.SIGKILL]


@pytest.mark.tried("hang", "kill -9 of rank 0 in a collective", "the others end within 3 s")
@pytest.mark.faults
def test_the_end_of_rank_0_ends_the_other_ranks(console: Path) -> None:
    ended = start(worker("kill", "0"), 3, console)
    assert errors(ended) == ["rank 0: ended without an error message: killed, or out of memory"]
    assert ended.codes == [-signal.SIGKILL, 1, 1]


@pytest.mark.tried("hang", "a rank that is stopped for 5 s", "the others wait for it and the run continues")
@pytest.mark.faults
def test_a_stopped_rank_is_not_taken_for_a_dead_one(console: Path) -> None:
    def wake(running: list[subprocess.Popen[bytes]]) -> None:
        wait_for_text(console, ["rank 0 is at work", "rank 1 is at work"])
        time.sleep(5.0)
        os.kill(running[1].pid, signal.SIGCONT)

    ended = start(worker("stop"), 2, console, meanwhile=wake)
    assert errors(ended) == []
    assert ended.codes == [0, 0]


@pytest.mark.tried(
    "hang", "a rank that is never started", "code 2 after launch.timeout, with one line that counts the ranks"
)
def test_a_missing_rank_is_named(console: Path) -> None:
    ended = start(worker("none", timeout=2), 2, console, world_size=3)
    (line,) = errors(ended)
    for part in ("only 2 of 3 ranks connected to 127.0.0.1:", "launch.timeout=2 seconds", "(missing: 2)", "check"):
        assert part in line
    assert ended.codes == [2, 2]


@pytest.mark.tried(
    "hang",
    "an unreachable peer (wrong MASTER_ADDR)",
    "code 2 after launch.timeout, with one line that names address and port",
)
@pytest.mark.faults
def test_a_wrong_address_is_named(console: Path) -> None:
    ended = start(worker("none", timeout=2), 2, console, master="nohost.invalid")
    zero, one = sorted(errors(ended))
    assert zero.startswith("only 1 of 2 ranks connected to nohost.invalid:")
    assert one.startswith("rank 1: rank 0 of 2 can't be reached at nohost.invalid:")
    assert ended.codes == [2, 2]
    assert "c10d" not in ended.console and "Traceback" not in ended.console


@pytest.mark.tried(
    "hang", "a rank that never enters a collective", "all end after launch.timeout, and the line says so"
)
@pytest.mark.faults
def test_a_rank_that_hangs_in_a_collective_is_the_stated_cause_of_the_timeout(console: Path) -> None:
    ended = start(worker("stuck", timeout=3), 2, console)
    time_out, meaning = errors(ended)
    assert time_out.startswith("rank 0: RuntimeError: ") and "Timed out" in time_out
    assert meaning.startswith("rank 0: a rank did not answer within launch.timeout=3 seconds")
    assert ended.codes == [1, 1]


@pytest.mark.tried("hang", "an exception on one rank under the deepspeed launcher", "as above")
@pytest.mark.faults
def test_under_deepspeeds_launcher(console: Path) -> None:
    """Of a script that has no handler of its own, as a benchmark."""
    ended = launch(worker("uncaught"), 2, console)
    assert errors(ended) == ["rank 1: ZeroDivisionError: boom at work"]
    assert ended.codes == [1]
    assert ended.console.count("Traceback") == 1


@pytest.mark.tried(
    "hang", "bad rows on one node only", "all end with code 2 and one line that names rank, file and row"
)
@pytest.mark.faults
@pytest.mark.timeout(120)
def test_bad_rows_on_one_node_end_the_command_on_all(
    console: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """The real command, where the second rank's file is torn."""
    (tmp_path / "torn.jsonl").write_text('{"prompt": "how do i rob the bank ?", "category": {}, "is_safe": true}\n')
    command = ["-m", "alignx_ds", "specialists", str(write_recipe("launch.ranks=2"))]
    torn = [*command, f"axes.harmless.train={tmp_path / 'torn.jsonl'}"]
    ended = start(command, 2, console, alone={1: torn}, deadline=90.0)
    (line,) = errors(ended)
    assert line.startswith(f"rank 1: {tmp_path / 'torn.jsonl'}, row 1: no column 'response'")
    assert ended.codes == [2, 2]
    assert not (tmp_path / "run" / "specialists").exists()


def test_the_helper_reports_a_hang(console: Path) -> None:
    """Otherwise no test above could fail."""
    ended = start(["-c", "import os, time; time.sleep(60 * (os.environ['RANK'] == '1'))"], 2, console, deadline=2.0)
    assert ended.codes == [0, None]
