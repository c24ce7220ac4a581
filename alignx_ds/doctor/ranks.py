"""Start two real ranks on this machine and run the collectives of training, up to an MoE layer, within time limits.

`attempt` starts them; each runs `python -m alignx_ds.doctor.ranks BACKEND REPORT`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as torch_dist

from alignx_ds.runtime import distributed
from alignx_ds.runtime.deepspeed import load_deepspeed

STEPS = ("rendezvous", "all_reduce", "all_to_all", "MoE dispatch")
HIDDEN, TOKENS, RANKS = 8, 6, 2
LAUNCHER_SET = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Step:
    """The time that a step took on both ranks, or the reason why it did not finish."""

    name: str
    seconds: float
    problem: str = ""


def attempt(backend: str, start_limit: float, step_limit: float) -> Iterator[Step]:
    """The steps up to the first that fails. The first takes longest: it imports torch and DeepSpeed."""
    if problem := loopback_problem():  # the ranks would wait for their time limit
        yield Step(STEPS[0], 0.0, problem)
        return
    with tempfile.TemporaryDirectory(prefix="alignx-doctor-") as scratch:
        running = _start(backend, Path(scratch))
        try:
            for number, name in enumerate(STEPS):
                started = time.monotonic()
                problem = _wait(running, number + 1, start_limit if number == 0 else step_limit)
                yield Step(name, time.monotonic() - started, problem)
                if problem:
                    return
        finally:
            for rank in running:
                rank.end()


def loopback_problem() -> str:
    """Why this machine can't connect to itself; empty if it can."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=10.0).close()
    except OSError as error:
        return f"no connection to 127.0.0.1: {error}"
    return ""


@dataclass(frozen=True)
class _Rank:
    process: subprocess.Popen[bytes]
    report: Path
    errors: Path

    def steps_done(self) -> int:
        return len(self.report.read_text(encoding="utf-8").splitlines())

    def last_error_line(self) -> str:
        lines = self.errors.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no error message")

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _start(backend: str, scratch: Path) -> list[_Rank]:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_SET}
    environment |= {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(distributed.free_port())}
    environment |= {"OMP_NUM_THREADS": "1"} | ({} if backend == "nccl" else {"DS_ACCELERATOR": "cpu"})
    running = []
    for rank in range(RANKS):
        report, errors = scratch / f"report{rank}", scratch / f"errors{rank}"
        report.touch()
        command = [sys.executable, "-m", "alignx_ds.doctor.ranks", backend, str(report)]
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with errors.open("wb") as file:
            process = subprocess.Popen(command, env=own, stdout=file, stderr=file, start_new_session=True)
        running.append(_Rank(process, report, errors))
    return running


def _wait(running: list[_Rank], steps: int, limit: float) -> str:
    """Wait until every rank has done so many steps. Returns what went wrong, or an empty text."""
    deadline = time.monotonic() + limit
    while any(rank.steps_done() < steps for rank in running):
        for number, rank in enumerate(running):
            if rank.process.poll() and rank.steps_done() < steps:
                return f"rank {number}: {rank.last_error_line()}"
        if time.monotonic() > deadline:
            return f"not finished within {limit:g} s"
        time.sleep(0.02)
    return ""


def rendezvous(backend: str) -> None:
    """Make the process group, and a first exchange: NCCL connects only then."""
    load_deepspeed().init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(seconds=20))
    torch_dist.barrier()


def all_reduce(device: torch.device) -> None:
    total = torch.full((4,), float(torch_dist.get_rank() + 1), device=device)
    torch_dist.all_reduce(total)
    _agree(bool((total == 3).all()), f"1 + 2 gave {total.tolist()}")


def all_to_all(device: torch.device) -> None:
    """Each rank receives one number from each rank."""
    rank = torch_dist.get_rank()
    sent = torch.tensor([10.0 * rank, 10.0 * rank + 1], device=device)
    received = torch.empty_like(sent)
    torch_dist.all_to_all_single(received, sent)
    _agree(received.tolist() == [float(rank), 10.0 + rank], f"rank {rank} received {received.tolist()}")


def moe_dispatch(device: torch.device) -> None:
    """One expert per rank, which multiply by 1 and by 2. A mixture multiplies each token by one factor in between."""
    rank = torch_dist.get_rank()
    expert = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
    torch.nn.init.eye_(expert.weight)
    with torch.no_grad():
        expert.weight.mul_(rank + 1)
    layer = (
        load_deepspeed()
        .moe.layer.MoE(HIDDEN, expert, num_experts=RANKS, ep_size=RANKS, k=2, min_capacity=0, drop_tokens=False)
        .to(device)
    )
    layer.set_deepspeed_parallelism()
    tokens = torch.rand(1, TOKENS, HIDDEN, device=device) + 0.5
    factors = (layer(tokens)[0] / tokens).detach()
    alike = bool((factors.amax(-1) - factors.amin(-1) < 1e-4).all())
    _agree(alike and bool(((factors > 1) & (factors < 2)).all()), "tokens came back from the wrong expert")


def work(backend: str, report: Path) -> None:
    """Run all steps on this rank. A step that succeeds adds a line to the report."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    steps: dict[str, Callable[[], None]] = {
        "rendezvous": lambda: rendezvous(backend),
        "all_reduce": lambda: all_reduce(device),
        "all_to_all": lambda: all_to_all(device),
        "MoE dispatch": lambda: moe_dispatch(device),
    }
    assert tuple(steps) == STEPS
    for name, step in steps.items():
        step()
        with report.open("a", encoding="utf-8") as lines:
            lines.write(f"{name}\n")
    torch_dist.destroy_process_group()


def _agree(right: bool, otherwise: str) -> None:
    if not right:
        raise RuntimeError(otherwise)


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
    distributed.exit_rank(0)
