"""The helper that starts ranks: a hang or a failure of one is a failure that shows what each of them wrote."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from ranks import RanksError, start

SCRIPT = """
import os, subprocess, sys
rank = os.environ["RANK"]
print(f"rank {rank} of {os.environ['WORLD_SIZE']} speaks", file=sys.stderr, flush=True)
if sys.argv[1] == "fail" and rank == "1":
    sys.exit(3)
if sys.argv[1] != "end":
    subprocess.run([sys.executable, "-c", f"import time; time.sleep(3); open({sys.argv[2]!r}, 'w')"])
"""


@pytest.mark.parametrize(("how", "complaint"), [("fail", "exit codes {'rank1': 3}"), ("hang", "still running after")])
def test_failures_and_hangs_are_told_and_leave_nothing_running(tmp_path: Path, how: str, complaint: str) -> None:
    script, survivor = tmp_path / "script.py", tmp_path / "survivor"
    script.write_text(SCRIPT)
    with pytest.raises(RanksError) as caught:
        start(script, 2, how, str(survivor), logs=tmp_path / "logs", timeout=1.5)
    for text in (complaint, "rank 0 of 2 speaks", "rank 1 of 2 speaks"):
        assert text in str(caught.value)
    time.sleep(3.0)
    assert not survivor.exists()  # what a rank had started was ended too


def test_ranks_that_end_well_are_no_failure(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    start(script, 2, "end", logs=tmp_path / "logs", timeout=20.0)
