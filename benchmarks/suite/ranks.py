"""Ranks of a benchmark: its own script, started anew under DeepSpeed's launcher; rank 0's findings are read back.

A launch costs some 13 s, so one launch measures everything that is wanted of its world size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 1  # of a CPU's rank, so that more ranks are more cores
STALE = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
HUNG = 1800.0  # seconds after which a world is given up


def add_options(parser: argparse.ArgumentParser, default: list[int]) -> None:
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=default, metavar="N", help="world sizes (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and configurations, for a first look")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # a rank: where to leave its findings


def hide_gpus() -> None:
    """Before anything asks for a GPU: DeepSpeed's launcher shows them to the ranks of a CPU's world, too."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def collect(ranks: int, device: str) -> Any:
    """What `work` returned on rank 0 of so many ranks, started with this process's own command line."""
    from alignx_ds import distributed

    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory) / "found.json"
        launcher = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "-q", "--no_local_rank"]
        launcher += ["--num_accelerators", str(ranks), "--master_port", str(distributed.free_port())]
        command = [*launcher, *sys.argv, "--worker", str(found)]
        process = subprocess.Popen(command, env=_environment(device), start_new_session=True)
        try:
            code = process.wait(HUNG)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                process.terminate()  # the launcher ends its ranks
                process.wait()
        if code or not found.is_file():
            why = f"still running after {HUNG:g} s" if code is None else f"exit code {code}"
            raise SystemExit(f"{ranks} ranks: {why}; see above")
        return json.loads(found.read_text(encoding="utf-8"))


def _environment(device: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in STALE}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(THREADS)}
    return environment


def work(path: Path, measure: Callable[[], Any]) -> None:
    """A rank's whole life; what rank 0 has measured is left at `path`."""
    from alignx_ds import distributed

    distributed.init()
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(distributed.device())
    found = measure()
    if distributed.is_main():
        path.write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.shutdown()


def threads(device: str) -> int | None:
    """Of each rank; on a GPU machine the environment decides."""
    return THREADS if device == "cpu" else None


def check(worlds: list[int], device: str) -> list[str]:
    """Notes on worlds that the machine is too small for: cores can be shared in turns, GPUs can't be."""
    import torch

    room = torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1
    over = [n for n in worlds if n > room]
    if over and device == "cuda":
        raise SystemExit(f"--ranks {' '.join(map(str, over))}: this machine has {room} GPUs")
    return [f"{n} ranks on {room} cores: oversubscribed, so no faster than {room} ranks can be" for n in over]
