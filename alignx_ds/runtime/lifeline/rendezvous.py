"""Connects this rank to rank 0's server, whose address is published in torch's store at MASTER_ADDR:MASTER_PORT."""

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
from alignx_ds.runtime.exit import exit_now
from alignx_ds.runtime.failures import Failure
from alignx_ds.runtime.interfaces import address_towards
from alignx_ds.runtime.lifeline.client import Client
from alignx_ds.runtime.lifeline.server import LATE_LIMIT, Server

LOOPBACK = "127.0.0.1"
RANK_0_FIRST = 3.0  # seconds that an unconnected rank waits before it prints: rank 0 may print the same and end the job


@dataclass
class _State:
    """This process's part in the lifeline."""

    store: Any = None  # kept alive: on rank 0 it may serve the other ranks, and torch's own rendezvous
    server: Server | None = None  # on rank 0
    client: Client | None = None
    attempted: bool = False
    finished: bool = False
    timeout: int = 0


_state = _State()


def is_connected() -> bool:
    return _state.client is not None


def is_finished() -> bool:
    return _state.finished


def collective_timeout() -> int:
    """The seconds that ranks wait for each other; 0 before `connect`."""
    return _state.timeout


def connect(rank: int, world_size: int, timeout: int) -> None:
    """Connect to rank 0's server; rank 0 starts it first. Raises UserError after `timeout` seconds without rank 0."""
    deadline = time.monotonic() + timeout
    _state.attempted, _state.timeout = True, timeout
    # torchrun's store survives a restart, so each start has a key of its own.
    key = f"alignx-ds/lifeline/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    hosts_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not hosts_store:
            _wait_for_port(address, int(port), deadline)
        _state.store = torch_dist.TCPStore(  # type: ignore[attr-defined] # public, but not declared so
            "localhost" if hosts_store else address,
            int(port),
            is_master=hosts_store,
            timeout=timedelta(seconds=max(1.0, deadline - time.monotonic())),
            wait_for_workers=False,
            multi_tenant=True,
        )
        if rank == 0:
            _state.server = Server(world_size, _server_addresses(address))
            _state.client = Client(rank, _state.server.advertisement)
            _state.store.set(key, _state.server.advertisement)
        else:
            _state.client = Client(rank, _state.store.get(key).decode())
    except (OSError, ValueError, RuntimeError) as error:  # torch's are RuntimeErrors
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank 0 of {world_size} can't be reached at {address}:{port} within launch.timeout={timeout} seconds "
            f"({reason}); check MASTER_ADDR and MASTER_PORT, that rank 0 was started and runs, that nothing "
            "else uses the port, and that no firewall is between the nodes"
        ) from error
    atexit.register(finish)  # an ordinary exit is no failure


def _wait_for_port(address: str, port: int, deadline: float) -> None:
    """Torch would wait for it too, but prints C++ stack traces meanwhile."""
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _server_addresses(master: str) -> list[str]:
    """The addresses at which other ranks may reach this host, best first."""
    if master in (LOOPBACK, "localhost"):
        return [LOOPBACK]
    found = (address_towards(master), master, socket.gethostname())
    return [address for address in dict.fromkeys(found) if address]


def wait_for_all_ranks(timeout: int) -> None:
    """Raises UserError after `timeout` seconds; on rank 0 it lists the missing ranks."""
    server, client = _state.server, _state.client
    # The other ranks wait longer, so that rank 0, which knows who is missing, fails first.
    if client is None or client.all_connected.wait(timeout + (0 if server else LATE_LIMIT)):
        return
    connected, missing = "not all ranks", ""
    if server:
        ranks = server.missing()
        server.late_limit = 0.0  # this wait was the time that late ranks get
        connected = f"only {server.world_size - len(ranks)} of {server.world_size} ranks"
        missing = f" (missing: {', '.join(map(str, ranks))})"
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    raise UserError(
        f"{connected} connected to {place} within launch.timeout={timeout} seconds{missing}; check that every node was "
        "started, with the same MASTER_ADDR and MASTER_PORT and the same number of ranks, and that no firewall is "
        "between them"
    )


def finish() -> None:
    """This rank has finished its work: from now on its exit is no failure."""
    if _state.client is not None and not _state.finished:
        _state.finished = True
        _state.client.finish()


def report_failure(failure: Failure, rank: int, world_size: int) -> NoReturn:
    """End this process and all other ranks."""
    if not _state.attempted:  # this rank failed before it connected; the others may not have failed
        with suppress(UserError):
            connect(rank, world_size, int(LATE_LIMIT))
    if _state.client is not None:
        _state.client.report_failure(failure)
    if rank:
        time.sleep(RANK_0_FIRST)
    exit_now(failure.code, failure.traceback + failure.lines(f"rank {rank}: " if rank else ""))
