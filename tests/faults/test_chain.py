"""A crash, a NaN and a signal in one run, one after the other: the part of these faults that every test run covers."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Command, results
from recording import Record

from alignx_ds.errors import EXIT_CODE, EXIT_STOPPED


@pytest.mark.timeout(600)
def test_a_crash_a_nan_and_a_signal_in_one_run_leave_no_trace(
    tmp_path: Path,
    undisturbed,  # type: ignore[no-untyped-def]
    record: Record,
) -> None:
    command = Command("align", tmp_path / "run")
    torn = command.start(
        fault={"rank": 0, "kind": "kill", "job": "stage1/helpful", "step": 4, "place": "save", "sync": 2}
    )
    assert torn.codes[0] == -9 and torn.codes[1] == 1, torn.console
    assert [p.name for p in (command.output / "checkpoints/stage1/helpful").glob("step_*")] == ["step_00000002"]
    poisoned = command.start(fault={"rank": 1, "kind": "nan loss", "job": "stage1/honest", "step": 5})
    assert poisoned.codes == [EXIT_CODE] * 2, poisoned.console
    assert "stage1/helpful: resumes after step 2" in poisoned.console
    assert "is not finite at step 5" in poisoned.console
    asked = command.start(fault={"rank": 1, "kind": "usr1", "job": "stage2", "step": 3})
    assert asked.codes == [EXIT_STOPPED] * 2, asked.console
    assert "stage1/honest: resumes after step 4" in asked.console
    ended = command.start()
    assert ended.well, ended.console
    assert "stage2: resumes after step" in ended.console
    assert results(command.output) == results(undisturbed("align"))
    record("crash", "kill -9 in a checkpoint, then a NaN, then SIGUSR1, in one run", "the same bytes in the end")
