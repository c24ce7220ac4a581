"""The same tiny job under mpirun and torchrun makes what it makes on one node under `deepspeed`, to the bit."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from jobs import HERE, RECIPE, REPO, SMALL, finished, specialists, started, until

from alignx_ds.runtime.distributed import free_port

MPI_FLAGS = "--oversubscribe" + (" --allow-run-as-root" if os.geteuid() == 0 else "")
STUB = HERE / "stub"
pytestmark = pytest.mark.timeout(300)
# What runs the launcher as `alignx-ds run` does, around a program that starts at once.
LAUNCH = (
    "import os, sys; from alignx_ds.runtime import launcher; sys.exit(launcher.run_launcher(sys.argv[1:], os.environ))"
)


def test_mpirun_makes_what_deepspeed_makes(one_node: Path, tmp_path: Path) -> None:
    """Every rank is one of two, by Open MPI's variables: two runs of one rank would write one output, and differ."""
    output = tmp_path / "run"
    arguments = (RECIPE, *SMALL, f"output={output}")
    finished("launch/mpi.sh", *arguments, VERB="specialists", MPI_FLAGS=MPI_FLAGS, MASTER_PORT=str(free_port()))
    assert specialists(output) == specialists(one_node)
    assert all(len(made["losses"]) == 2 for made in specialists(output).values())


@pytest.mark.launchers
def test_torchrun_makes_what_deepspeed_makes(one_node: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ("specialists", RECIPE, *SMALL, f"output={output}")
    finished("torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m", "alignx_ds", *arguments)
    assert specialists(output) == specialists(one_node)


@pytest.mark.launchers
@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_command_reaches_every_rank_and_its_exit_code_comes_back(
    tmp_path: Path, signum: signal.Signals
) -> None:
    program = ["deepspeed", "-q", "--no_local_rank", "--num_accelerators", "2", "--master_port", str(free_port())]
    command = (sys.executable, "-c", LAUNCH, *program, STUB / "alignx_ds" / "__main__.py")
    with started(*command, STUB_DIRECTORY=str(tmp_path)) as process:
        until(lambda: len(list(tmp_path.glob("*.json"))) == 2, "both ranks started")
        process.send_signal(signum)
        assert process.wait(timeout=60) == 75
    for report in tmp_path.glob("*.json"):
        assert not Path(f"/proc/{json.loads(report.read_text())['pid']}").exists()


@pytest.mark.launchers
def test_mpirun_hands_a_signal_on(tmp_path: Path) -> None:
    more = {"MPI_FLAGS": MPI_FLAGS, "STUB_DIRECTORY": str(tmp_path)}
    with started(REPO / "launch/mpi.sh", RECIPE, cwd=STUB, **more) as process:
        until(lambda: len(list(tmp_path.glob("*.json"))) == 2, "both ranks started")
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 75
