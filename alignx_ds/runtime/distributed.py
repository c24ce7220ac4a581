"""Ranks, process groups and collectives; everything also works in one process without a process group."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as torch_dist
from safetensors import SafetensorError

from alignx_ds.errors import DataError, UserError
from alignx_ds.runtime import memory
from alignx_ds.runtime.deepspeed import load_deepspeed
from alignx_ds.runtime.exit import exit_now
from alignx_ds.runtime.failures import denied, failure_of
from alignx_ds.runtime.interfaces import interface_towards
from alignx_ds.runtime.launched import Launched, launched
from alignx_ds.runtime.lifeline import rendezvous

T = TypeVar("T")


def under_launcher() -> bool:
    """Whether deepspeed, torchrun, mpirun or srun started this process."""
    return launched() is not None


def planned_world_size(ranks: int) -> int:
    """The number of ranks of the run: the launcher's, or else `ranks`, which the command starts itself."""
    place = launched()
    return place.world_size if place else ranks


def _set_rank_variables() -> None:
    """Set what torch and DeepSpeed read to find the other ranks, as far as the launcher has not."""
    # DeepSpeed's own MPI discovery imports mpi4py, whose finaliser blocks the other ranks when one fails.
    place = launched() or Launched(0, 1, 0)
    os.environ |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.world_size), "LOCAL_RANK": str(place.local_rank)}
    if place.world_size > 1 or "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's agent serves the address, also for one
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
    elif not torch_dist.is_initialized():  # whatever an earlier job has left
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if interface := interface_towards(os.environ["MASTER_ADDR"]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def free_port() -> int:
    """A random free TCP port below those that systems give to outgoing connections, which could take it before use."""
    while True:
        port = 15000 + secrets.randbelow(15000)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


def start_failure_detection(timeout: int) -> None:
    """From now on a failure of any rank ends all of them. Raises UserError when rank 0 can't be reached.

    Waits for rank 0 only; `init_process_group` waits for all ranks.
    """
    place = launched()
    if place and place.world_size > 1 and not rendezvous.is_connected():
        _set_rank_variables()
        # A timeout that is no valid number of seconds is reported later, with the config's other problems.
        rendezvous.connect(place.rank, place.world_size, max(1, timeout))
        sys.excepthook = _uncaught


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Replaces Python's hook, which prints a traceback but does not end the other ranks."""
    if rendezvous.is_connected() and not rendezvous.is_finished():
        handle_failure(error)
    sys.__excepthook__(kind, error, trace)


def init_process_group(timeout: int) -> None:
    """Start DeepSpeed's process group; gloo on CPUs. No rank waits longer than `timeout` seconds for the others."""
    _set_rank_variables()
    start_failure_detection(timeout)
    rendezvous.wait_for_all_ranks(timeout)
    deepspeed = load_deepspeed()
    silence_libraries()
    if not torch_dist.is_initialized():
        limit = timedelta(seconds=timeout)
        # DeepSpeed makes the expert groups without a timeout, so they take torch's default.
        for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
            setattr(torch_dist.distributed_c10d, name, limit)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=limit)
        memory.keep()


def silence_libraries() -> None:
    """Keep the libraries' progress bars and deprecation warnings off the terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def shutdown() -> None:
    """End the process group. Does nothing while an exception propagates: that ends all ranks and must not block."""
    if sys.exc_info()[0] is not None:
        return
    if torch_dist.is_initialized():
        load_deepspeed().comm.destroy_process_group()  # or the next group of this process would meet its own groups
    rendezvous.finish()


def handle_failure(error: BaseException) -> int:
    """Print the error once, however many ranks fail, and end them all.

    Returns the exit code where this is the only rank or the others have finished; there an error that is not the
    user's to fix is raised again.
    """
    failure = failure_of(error, rendezvous.collective_timeout())
    place = launched()
    if place and place.world_size > 1 and not rendezvous.is_finished():
        _set_rank_variables()
        rendezvous.report_failure(failure, place.rank, place.world_size)
    if failure.traceback:
        raise error
    print(failure.lines(), end="", file=sys.stderr)
    return failure.code


def exit_rank(code: int) -> NoReturn:
    """End this process after its work. The last call of every program that runs as a rank.

    One rank of several skips the interpreter's teardown. C++ threads of gloo and of torch's store may still run then,
    and destroying what they use would abort a rank that has finished its work.
    """
    rendezvous.finish()
    if planned_world_size(1) > 1:
        exit_now(code)
    sys.exit(code)


def rank() -> int:
    if torch_dist.is_initialized():
        return torch_dist.get_rank()
    place = launched()
    return place.rank if place else 0


def world_size() -> int:
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    if torch.cuda.is_available():
        place = launched()
        return torch.device("cuda", place.local_rank if place else 0)
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


def on_all(condition: bool) -> bool:
    """Whether it holds on every rank. Collective."""
    if world_size() == 1:
        return condition
    found = torch.tensor(int(condition), device=device())
    torch_dist.all_reduce(found, op=torch_dist.ReduceOp.MIN)
    return bool(found)


def on_main(work: Callable[[], T]) -> T:
    """Do it on rank 0; every rank gets the result, or raises the same UserError, so that no rank waits in vain."""
    outcome: tuple[T | None, UserError | None] = (None, None)
    if is_main():
        try:
            outcome = (work(), None)
        except UserError as error:
            outcome = (None, error)
        except (OSError, SafetensorError) as error:
            outcome = (None, DataError(denied(error)))
    result, problem = broadcast(outcome)
    if problem is not None:
        raise problem
    return result  # type: ignore[return-value]


def rank_share(items: list[T]) -> list[T]:
    """This rank's items, strided; `interleave` puts the gathered shares back in order."""
    return items[rank() :: world_size()]


def lockstep(own: list[T], size: int, items: int, spare: T) -> Iterator[tuple[list[T], bool]]:
    """Batches of `size` of this rank's share of so many `items`, as many as any rank has.

    So all ranks make the same number of forward passes, which experts or weights that are spread over them need. Where
    this rank has no more, the batch is the `spare` item and the flag is false: its results are not wanted.
    """
    for start in range(0, -(-items // world_size()), size):
        chosen = own[start : start + size]
        yield chosen or [spare], bool(chosen)


def interleave(shares: list[list[T]]) -> list[T]:
    """Undo `rank_share` on gathered shares."""
    merged: list[T] = []
    for i in range(max(len(s) for s in shares)):
        merged += [share[i] for share in shares if i < len(share)]
    return merged
