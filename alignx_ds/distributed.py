"""Ranks, process groups and collectives; everything also works in one process without a process group."""

from __future__ import annotations

import os
import re
import socket
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from safetensors import SafetensorError

from alignx_ds.config import LaunchConfig
from alignx_ds.errors import DataError, UserError
from alignx_ds.failures import failure_of
from alignx_ds.interfaces import interface_towards
from alignx_ds.lifeline import meeting

T = TypeVar("T")
TIMEOUT = LaunchConfig.timeout

_OPENMPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
}


def under_launcher() -> bool:
    """Whether deepspeed, torchrun or mpirun started this process."""
    return "WORLD_SIZE" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ


def planned_world_size(ranks: int) -> int:
    """How many ranks the run will have: the launcher's, or those it is going to start itself."""
    given = os.environ.get("WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE")
    return int(given) if given else ranks


def prepare_environment() -> None:
    """Before deepspeed is imported: choose the accelerator, and translate mpirun's variables."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # halves the time that deepspeed.initialize takes
    # Batches of ever other lengths fit ever fewer of the blocks that torch's allocator keeps by default.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # Images for Hopper name its architecture 9.0a: DeepSpeed 0.19 can't read the letter when it compiles an optimizer.
    if named := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = re.sub(r"(?<=\d)[a-z]+", "", named)
    # DeepSpeed's own MPI discovery imports mpi4py, whose finaliser blocks the other ranks when one fails.
    for name, source in _OPENMPI.items():
        if source in os.environ:
            os.environ.setdefault(name, os.environ[source])
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    else:
        os.environ.setdefault("MASTER_PORT", "29500")
    if towards_first := interface_towards(os.environ["MASTER_ADDR"]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", towards_first)
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, alone)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join(timeout: int = TIMEOUT) -> None:
    """From here on a failure of any rank ends all of them. Raises UserError when rank 0 can't be reached.

    Waits for rank 0 alone; `init` waits for all.
    """
    if under_launcher() and planned_world_size(1) > 1 and not meeting.joined():
        prepare_environment()
        # What is no number of seconds is refused with the config's other problems.
        meeting.join(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), max(1, timeout))
        sys.excepthook = _uncaught


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python would only print."""
    if meeting.joined() and not meeting.parted():
        fail(error)
    sys.__excepthook__(kind, error, trace)


def init(timeout: int = TIMEOUT) -> None:
    """Start DeepSpeed's process group; gloo on CPUs. No rank waits longer than `timeout` seconds for the others."""
    prepare_environment()
    join(timeout)
    meeting.all_have_come(timeout)
    import deepspeed
    from deepspeed import ops

    # The shared-memory op is compiled at first use (40 s, needs g++) and serves only inference_all_reduce.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    quiet()
    if not torch_dist.is_initialized():
        patience = timedelta(seconds=timeout)
        # DeepSpeed makes the groups of experts without a timeout: they take torch's own default.
        for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
            setattr(torch_dist.distributed_c10d, name, patience)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=patience)


def quiet() -> None:
    """Leave the terminal to our own headings and progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def shutdown() -> None:
    """The end of a run. Where an exception is on its way, nothing: it ends all ranks, and may not be held up."""
    if sys.exc_info()[0] is not None:
        return
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
    meeting.part()


def fail(error: BaseException) -> int:
    """Tell the console once, whichever ranks fail, and end them all. Where this rank is the only one, or has parted
    from the others, an error that was foreseen gives the exit code, and any other is raised again."""
    failure = failure_of(error, meeting.patience())
    if under_launcher() and planned_world_size(1) > 1 and not meeting.parted():
        prepare_environment()
        meeting.fail(failure, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if failure.traceback:
        raise error
    print(failure.lines(), end="", file=sys.stderr)
    return failure.code


def rank() -> int:
    return torch_dist.get_rank() if torch_dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def barrier() -> None:
    if torch_dist.is_initialized():
        torch_dist.barrier()


def gather(item: T) -> list[T]:
    """Every rank's item, on every rank, by rank."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(items, item)
    return items


def broadcast(item: T) -> T:
    """Rank 0's item, on every rank."""
    if world_size() == 1:
        return item
    box = [item]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(work: Callable[[], T]) -> T:
    """Do it on rank 0; every rank gets the result, or raises the same UserError: nobody is left waiting."""
    outcome: tuple[T | None, UserError | None] = (None, None)
    if is_main():
        try:
            outcome = (work(), None)
        except UserError as error:
            outcome = (None, error)
        except (OSError, SafetensorError) as error:
            what = f"{getattr(error, 'filename', None) or 'the output'}: {getattr(error, 'strerror', None) or error}"
            mend = "make room or correct the permissions, and give the same command: it goes on"
            outcome = (None, DataError(f"{what}; {mend}"))
    result, problem = broadcast(outcome)
    if problem is not None:
        raise problem
    return result  # type: ignore[return-value]


def mine(items: list[T]) -> list[T]:
    """This rank's share, strided; `interleave` puts the gathered shares back in order."""
    return items[rank() :: world_size()]


def interleave(shares: list[list[T]]) -> list[T]:
    """Undo `mine` on gathered shares."""
    merged: list[T] = []
    for i in range(max(len(s) for s in shares)):
        merged += [share[i] for share in shares if i < len(share)]
    return merged
