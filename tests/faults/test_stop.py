"""SIGTERM, SIGUSR1 and Ctrl-C save the state and end with their code; a second signal ends at once; nothing is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import SMALL, Command, results, wait_for
from processes import REPO, environment
from recording import Record

from alignx_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED

Processes = list[subprocess.Popen[bytes]]


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("number", "job", "step"), [(signal.SIGTERM, "stage1/harmless", 3), (signal.SIGUSR1, "stage2", 3)]
)
def test_a_signal_to_one_rank_saves_and_stops_all(
    number: signal.Signals,
    job: str,
    step: int,
    tmp_path: Path,
    undisturbed,  # type: ignore[no-untyped-def]
    record: Record,
) -> None:
    command = Command("align", tmp_path / "run")
    fault = {"rank": 1, "kind": "term" if number == signal.SIGTERM else "usr1", "job": job, "step": step}
    ended = command.start(fault=fault)
    assert ended.codes == [EXIT_STOPPED] * 2, ended.console
    assert ended.console.count("run the same command again to continue") == 1
    assert f"stopped in {job}, after step" in ended.console
    assert "Traceback" not in ended.console
    ended = command.start()
    assert ended.well, ended.console
    assert f"{job}: resumes after step" in ended.console
    assert results(command.output) == results(undisturbed("align"))
    record("signal", f"{number.name} to one rank in {job}", f"a checkpoint, exit code {EXIT_STOPPED} on all ranks")


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_second_signal_ends_at_once_even_in_a_collective_that_hangs(tmp_path: Path, record: Record) -> None:
    command = Command("align", tmp_path / "run")
    seconds: list[float] = []

    def twice(ranks: Processes) -> None:
        wait_for(command.output / "checkpoints/stage1/helpful/step_00000002")
        ranks[1].send_signal(signal.SIGSTOP)  # from here rank 0 waits for it
        time.sleep(1)
        ranks[0].send_signal(signal.SIGTERM)
        time.sleep(4)
        assert ranks[0].poll() is None, "the first signal waits for the step's end"
        started = time.monotonic()
        ranks[0].send_signal(signal.SIGTERM)
        ranks[0].wait(timeout=20)
        seconds.append(time.monotonic() - started)
        ranks[1].send_signal(signal.SIGCONT)

    ended = command.start("train.steps=2000", during=twice)
    assert ended.codes[0] == 128 + signal.SIGTERM, ended.console
    assert seconds[0] < 2
    record("signal", "a second SIGTERM while a collective hangs", f"exit code 143 after {seconds[0]:.1f} s", "the step")


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, EXIT_STOPPED), (signal.SIGINT, EXIT_INTERRUPTED)])
def test_a_signal_to_the_command_reaches_the_ranks_behind_the_launcher(
    number: signal.Signals,
    code: int,
    tmp_path: Path,
    undisturbed,  # type: ignore[no-untyped-def]
    record: Record,
) -> None:
    output = tmp_path / "run"
    line = [sys.executable, "-m", "alignx_ds", "align", *SMALL, "launch.ranks=2", f"output={output}"]
    with subprocess.Popen(
        line, cwd=REPO, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        wait_for(output / "checkpoints/stage1/harmless/step_00000002")
        run.send_signal(number)
        console = run.communicate(timeout=120)[0]
    assert run.returncode == code and "Traceback" not in console, console
    ended = Command("align", output).start()
    assert ended.well, ended.console
    assert results(output) == results(undisturbed("align"))
    record("signal", f"{number.name} to `alignx-ds` above the deepspeed launcher", f"exit code {code}, goes on")
