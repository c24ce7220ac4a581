"""Programs of the project in processes of their own, none of which outlives its test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

from alignx_ds.runtime.distributed import free_port

REPO = Path(__file__).resolve().parents[1]
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEEPSPEED = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "-q", "--no_local_rank"]


@contextmanager
def process_group() -> Iterator[None]:
    """DeepSpeed's process group of this one process: NCCL on a GPU. The environment is then as it was before."""
    before = dict(os.environ)
    from alignx_ds.runtime import distributed

    distributed.init_process_group(120)
    yield
    distributed.shutdown()
    os.environ.clear()
    os.environ.update(before)


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what a launcher sets."""
    outside = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return outside | {"PYTHONPATH": str(REPO)} | more


def cpu_environment(**more: str) -> dict[str, str]:
    """The same on a machine without GPUs, with a thread per process."""
    cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return environment(**cpu) | more


def rank_variables(world_size: int, master: str = "127.0.0.1") -> list[dict[str, str]]:
    """What a launcher sets for each rank of a job."""
    job = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": master, "MASTER_PORT": str(free_port())}
    return [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def deepspeed_command(ranks: int) -> list[str]:
    """DeepSpeed's launcher; the script and its arguments follow."""
    return [*DEEPSPEED, "--num_accelerators", str(ranks), "--master_port", str(free_port())]


def alignx_ds(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`alignx-ds ARGUMENTS`, to its end."""
    command = [sys.executable, "-m", "alignx_ds", *arguments]
    return subprocess.run(
        command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=280, check=False
    )


def in_this_process(*arguments: str, place: Path = REPO) -> subprocess.CompletedProcess[str]:
    """The same without the seconds in which a new process imports torch and transformers; ranks are its children."""
    from alignx_ds import cli

    before, inside = dict(os.environ), environment()
    try:
        os.environ.clear()
        os.environ.update(inside)
        with chdir(place), _written() as (out, err):
            code = cli.main(arguments)
            for file in (out, err):
                file.seek(0)
            printed = out.read(), err.read()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return subprocess.CompletedProcess(arguments, code, *printed)


@contextmanager
def _written() -> Iterator[tuple[TextIO, TextIO]]:
    """What this process and those that it starts write to their output and error streams."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        before = os.dup(1), os.dup(2)
        for file, stream in ((out, 1), (err, 2)):
            os.dup2(file.fileno(), stream)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                yield out, err
        finally:
            for copy, stream in zip(before, (1, 2), strict=True):
                os.dup2(copy, stream)
                os.close(copy)


def kill_group(process: subprocess.Popen[Any]) -> None:
    """The process and all that it has started; it must lead a process group of its own (`start_new_session`)."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
