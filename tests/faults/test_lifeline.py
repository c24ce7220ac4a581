"""The hub believes only who has its token, and only lines of JSON; the groups of experts wait as long as all others."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
from together import REPO, environment

from alignx_ds.errors import UserError
from alignx_ds.runtime.failures import failure_of
from alignx_ds.runtime.lifeline.channel import LINE
from alignx_ds.runtime.lifeline.hub import Hub
from alignx_ds.runtime.lifeline.line import Lifeline

GROUPS = """
from alignx_ds import distributed
distributed.init(77)
import torch
from deepspeed import comm
for group in (torch.distributed.group.WORLD, comm.new_group([0])):
    print(int(group._get_backend(torch.device("cpu")).options._timeout.total_seconds()))
distributed.shutdown()
"""


@pytest.fixture
def hub() -> Hub:
    return Hub(2, ["127.0.0.1"])


def say(hub: Hub, *lines: bytes) -> bytes:
    """What a stranger hears before the hub hangs up."""
    with socket.create_connection(("127.0.0.1", json.loads(hub.invitation)["port"]), timeout=5.0) as link:
        try:
            link.sendall(b"".join(lines))
            return link.recv(100)
        except ConnectionResetError:
            return b""


def greeting(hub: Hub, **changes: Any) -> bytes:
    return json.dumps({"token": json.loads(hub.invitation)["token"], "rank": 1, "host": "h"} | changes).encode() + b"\n"


def test_strangers_are_hung_up_on(hub: Hub) -> None:
    wrong = [
        greeting(hub, token="0" * 32),
        greeting(hub, token="\ud800"),
        greeting(hub, token=None),
        greeting(hub, rank=2),
        greeting(hub, rank="1"),
        greeting(hub, rank=[]),
        b'{"kind": "failed", "message": "", "code": 1}\n',
        b"[]\n",
        b"[" * (LINE - 2) + b"\n",
        b"x" * 2 * LINE,
        pickle.dumps({"token": 1}) + b"\n",
    ]
    for line in wrong:
        assert say(hub, line) == b"", line[:80]
    assert hub.missing() == [0, 1]
    line = Lifeline(0, hub.invitation)
    heard = say(
        hub, greeting(hub) + b'{"kind": "done"}\n'
    )  # a rank that parts, or its end would be that of this process
    assert json.loads(heard.splitlines()[0]) == {"kind": "welcome"}
    assert line.complete.wait(5.0)
    line.part()
    hub.join(5.0)
    assert not hub.is_alive(), "all have parted: nobody is listened to any more"


def test_all_groups_wait_as_long_as_the_config_says() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROUPS],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["77", "77"], done.stderr


def test_what_the_console_is_told() -> None:
    def told(error: BaseException) -> tuple[str, int, bool]:
        failure = failure_of(error, 9)
        return failure.lines("rank 3: "), failure.code, bool(failure.traceback)

    with pytest.raises(RuntimeError) as refused:
        torch.empty(10**16)  # more than any machine has: torch on CPUs
    for error in (refused.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")):
        line, code, traceback = told(error)
        assert line.startswith("alignx-ds: error: rank 3: out of memory ") and line.count("\n") == 1
        assert (code, traceback) == (1, False)
    two = "alignx-ds: error: rank 3: one\nalignx-ds: error: rank 3: two\n"
    assert told(UserError("one\ntwo")) == (two, 2, False)
    assert told(KeyError("x")) == ("alignx-ds: error: rank 3: KeyError: 'x'\n", 1, True)
    assert told(KeyboardInterrupt()) == ("alignx-ds: error: rank 3: interrupted\n", 130, False)
    assert "within launch.timeout=9 seconds" in told(RuntimeError("Timed out waiting 9000ms for recv"))[0]
