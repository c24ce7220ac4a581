"""How the ranks of a launcher find rank 0's hub: its invitation lies in torch's store at MASTER_ADDR:MASTER_PORT."""

from __future__ import annotations

import atexit
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as torch_dist

from alignx_ds.errors import UserError
from alignx_ds.runtime.interfaces import address_towards
from alignx_ds.runtime.lifeline.failure import Failure, end
from alignx_ds.runtime.lifeline.hub import LATE, Hub
from alignx_ds.runtime.lifeline.line import Lifeline

LOOPBACK = "127.0.0.1"
FIRST_WORD = 3.0  # seconds that a rank without a hub leaves to rank 0: it may have said the same, and a launcher acted


@dataclass
class _Meeting:
    """This process's part in it."""

    store: Any = None  # on rank 0 it may serve the others, also torch's own rendezvous
    hub: Hub | None = None
    line: Lifeline | None = None
    tried: bool = False
    parted: bool = False
    timeout: int = 0


_here = _Meeting()


def joined() -> bool:
    return _here.line is not None


def parted() -> bool:
    return _here.parted


def patience() -> int:
    """Seconds that the ranks wait for each other."""
    return _here.timeout


def join(rank: int, world: int, timeout: int) -> None:
    """Hold on to rank 0. Raises UserError when it can't be reached within `timeout` seconds."""
    until = time.monotonic() + timeout
    _here.tried, _here.timeout = True, timeout
    key = f"alignx-ds/lifeline/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # torchrun's store outlives a start
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not serves:
            _await_port(address, int(port), until)
        _here.store = torch_dist.TCPStore(  # type: ignore[attr-defined] # public, but not said to be
            "localhost" if serves else address,
            int(port),
            is_master=serves,
            timeout=timedelta(seconds=max(1.0, until - time.monotonic())),
            wait_for_workers=False,
            multi_tenant=True,
        )
        if rank == 0:
            _here.hub = Hub(world, _addresses(address))
            _here.line = Lifeline(rank, _here.hub.invitation)
            _here.store.set(key, _here.hub.invitation)
        else:
            _here.line = Lifeline(rank, _here.store.get(key).decode())
    except (OSError, ValueError, RuntimeError) as error:  # torch's are RuntimeErrors
        reason = str(error).splitlines()[0]
        raise UserError(
            f"1 of {world} ranks is here, and rank 0 can't be met at {address}:{port} within launch.timeout={timeout} "
            f"seconds ({reason}); check MASTER_ADDR and MASTER_PORT, that rank 0 was started and runs, that nothing "
            "else uses the port, and that no firewall is between the nodes"
        ) from error
    atexit.register(part)  # an orderly end without a failure is none


def _await_port(address: str, port: int, until: float) -> None:
    """Torch waits for it as well, but fills the console with C++ stack traces in the meantime."""
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def _addresses(master: str) -> list[str]:
    """Where the other ranks may reach this one."""
    if master in (LOOPBACK, "localhost"):
        return [LOOPBACK]
    found = (address_towards(master), master, socket.gethostname())
    return [address for address in dict.fromkeys(found) if address]


def all_have_come(timeout: int) -> None:
    """Wait for every rank. Raises UserError that names the missing ones."""
    if _here.line is None or _here.line.complete.wait(timeout + (0 if _here.hub else LATE)):
        return
    here, who = "not all ranks", ""
    if _here.hub:
        world, missing = _here.hub.world, _here.hub.missing()
        _here.hub.late = 0.0  # they have been waited for
        here = f"only {world - len(missing)} of {world} ranks"
        who = f" (missing: {', '.join(map(str, missing))})"
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    raise UserError(
        f"{here} came to {place} within launch.timeout={timeout} seconds{who}; check that every node was started, with "
        "the same MASTER_ADDR and MASTER_PORT and the same number of ranks, and that no firewall is between them"
    )


def part() -> None:
    """This rank is done."""
    if _here.line is not None and not _here.parted:
        _here.parted = True
        _here.line.part()


def fail(failure: Failure, rank: int, world: int) -> NoReturn:
    """Ends this process and all others."""
    if not _here.tried:  # it failed before it met them, as they may have done
        with suppress(UserError):
            join(rank, world, int(LATE))
    if _here.line is not None:
        _here.line.fail(failure)
    if rank:
        time.sleep(FIRST_WORD)
    end(failure.traceback + failure.lines(f"rank {rank}: " if rank else ""), failure.code)
