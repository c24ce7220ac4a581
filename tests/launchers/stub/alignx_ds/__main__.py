"""Writes down what it was started with, waits for a signal, and ends as a run does that has written its checkpoint."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "OMPI_COMM_WORLD_RANK")


def stop(signum: int, frame: FrameType | None) -> None:
    sys.exit(75)


for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, stop)
seen = {name: os.environ.get(name) for name in NAMES} | {"arguments": sys.argv[1:], "pid": os.getpid()}
rank = seen["RANK"] or seen["OMPI_COMM_WORLD_RANK"]
partial = Path(os.environ["STUB_DIRECTORY"]) / f"{rank}.partial"
partial.write_text(json.dumps(seen))
partial.rename(partial.with_suffix(".json"))
if os.environ.get("STUB_EXIT"):
    sys.exit(int(os.environ["STUB_EXIT"]))
time.sleep(60)
