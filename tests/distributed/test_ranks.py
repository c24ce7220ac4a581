"""The helper that starts ranks: its error shows what every rank wrote, and it leaves nothing running."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from ranks import RanksError, start

CHILD = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w')); time.sleep(100)"
SCRIPT = f"""
import os, pathlib, subprocess, sys, time
rank, how, directory = os.environ["RANK"], sys.argv[1], pathlib.Path(sys.argv[2])
print(f"output of rank {{rank}} of {{os.environ['WORLD_SIZE']}}", file=sys.stderr, flush=True)
if how == "fail" and rank == "1":
    while not (directory / "0").exists():
        time.sleep(0.01)
    sys.exit(3)
if how != "end":
    subprocess.run([sys.executable, "-c", {CHILD!r}, str(directory / rank)])
"""


def is_running(process: int) -> bool:
    """Whether it runs; one that has ended may wait for its parent to notice."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("how", "message"), [("fail", "exit codes {'rank1': 3}"), ("hang", "still running after")])
def test_a_failure_or_a_hang_shows_all_output_and_leaves_nothing_running(
    tmp_path: Path, how: str, message: str
) -> None:
    script, started = tmp_path / "script.py", tmp_path / "started"
    script.write_text(SCRIPT)
    started.mkdir()
    with pytest.raises(RanksError) as caught:
        start(script, 2, how, str(started), logs=tmp_path / "logs", timeout=60.0 if how == "fail" else 4.0)
    for text in (message, "output of rank 0 of 2", "output of rank 1 of 2"):
        assert text in str(caught.value)
    children = [int(text) for path in started.iterdir() if (text := path.read_text())]
    assert children or how == "hang"
    deadline = time.monotonic() + 20.0  # killed processes take a moment to end
    while any(map(is_running, children)):
        assert time.monotonic() < deadline, "what a rank had started was ended too"
        time.sleep(0.01)


def test_ranks_that_end_well_are_no_failure(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    start(script, 2, "end", os.devnull, logs=tmp_path / "logs", timeout=60.0)
