"""A rank that runs collectives until its fault: `nohang_worker.py FAULT RANK|all LAUNCH_TIMEOUT`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # DeepSpeed's launcher sets it anew

import torch

from alignx_ds.errors import DataError
from alignx_ds.runtime import distributed
from alignx_ds.runtime.deepspeed import load_deepspeed


def cause(fault: str) -> None:
    if fault == "exception":
        raise ZeroDivisionError("boom at work")
    if fault == "data":
        raise DataError("rows.jsonl, row 7: no column 'response'")
    if fault == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)  # the test wakes it up
    if fault == "stuck":
        time.sleep(60.0)


def wait_for_all_started() -> None:
    """Some tests have time limits shorter than the time by which one rank may import DeepSpeed later than another."""
    load_deepspeed()
    if directory := os.environ.get("READY_DIRECTORY"):
        (Path(directory) / os.environ["RANK"]).touch()
        while len(os.listdir(directory)) < int(os.environ["STARTED_RANKS"]):
            time.sleep(0.01)


def work(fault: str, where: str, timeout: int) -> None:
    rank = int(os.environ["RANK"])
    is_faulty = where == "all" or rank == int(where)
    wait_for_all_started()
    if fault == "bad-start" and is_faulty:  # before the ranks are connected
        cause("data")
    distributed.init_process_group(timeout)
    try:
        total = torch.ones(1000)
        for step in range(30):
            torch.distributed.all_reduce(total)
            total /= distributed.world_size()
            if step == 10:
                print(f"rank {rank} is at work", flush=True)
            if step == 20 and is_faulty:
                cause(fault)
            time.sleep(0.02)
    finally:
        distributed.shutdown()
    print(f"rank {rank} is done", flush=True)


def main(fault: str, where: str, timeout: str) -> int:
    try:
        work(fault, where, int(timeout))
    except Exception as error:  # noqa: BLE001 - as the command line does
        return distributed.handle_failure(error)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "uncaught":  # as a script without an exception handler
        work("exception", sys.argv[2], int(sys.argv[3]))
    distributed.exit_rank(main(*sys.argv[1:]))
