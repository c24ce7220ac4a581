"""launch/multinode.sh over two hosts that share nothing but a wire and the disk: DeepSpeed's hostfile, pdsh and ssh."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import INTERFACE, Host, missing, ssh_on_path, two_hosts
from jobs import RECIPE, SMALL, aligned, environment, finished, specialists, started

pytestmark = [pytest.mark.launchers, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Host]]:
    """(root with a hostfile, the first host)."""
    if why_not := missing():
        pytest.skip(why_not)
    root = tmp_path_factory.mktemp("hosts")
    with two_hosts(root) as (first, second):
        (root / "hostfile").write_text(f"{first.name} slots=1\n{second.name} slots=1\n")
        yield root, first


def launch(root: Path, *arguments: str) -> list[str]:
    return ["launch/multinode.sh", str(root / "hostfile"), RECIPE, *SMALL, *arguments]


def path(root: Path) -> str:
    return f"{ssh_on_path(root)}:{environment()['PATH']}"


def test_both_stages_make_what_they_make_on_one_node(
    hosts: tuple[Path, Host], one_node_aligned: Path, tmp_path: Path
) -> None:
    """With an expert-parallel group across the wire. The first host's address leads to the interface that is shared."""
    root, first = hosts
    output = tmp_path / "run"
    printed = finished(*first.inside(*launch(root, f"output={output}")), VERB="align", PATH=path(root))
    assert specialists(output) == specialists(one_node_aligned)
    assert aligned(output) == aligned(one_node_aligned)
    assert len(set(re.findall(r"^(\S+): .*process \d+ spawned", printed, flags=re.MULTILINE))) == 2


@pytest.mark.parametrize(("interface", "met"), [(INTERFACE, True), ("lo", False)])
def test_the_user_s_choice_of_interface_reaches_every_host(hosts: tuple[Path, Host], interface: str, met: bool) -> None:
    """A program that starts at once stands in for the product: what counts is which variables it is started with."""
    root, first = hosts
    probe = root / interface / "alignx_ds"
    probe.mkdir(parents=True)
    (probe / "__init__.py").touch()
    (probe / "__main__.py").write_text(PROBE)
    more = {"PATH": path(root), "GLOO_SOCKET_IFNAME": interface, "HF_TOKEN": "secret"}
    script = str(Path("launch/multinode.sh").resolve())
    command = first.inside(script, *launch(root)[1:])
    with started(*command, cwd=probe.parent, **more) as process:
        printed, _ = process.communicate(timeout=90)
    assert (process.returncode == 0) == met, printed
    assert printed.count(f"sees {interface} None") == 2


PROBE = """
import os
from datetime import timedelta
print("sees", os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("HF_TOKEN"), flush=True)
import torch
import torch.distributed as dist
dist.init_process_group("gloo", timeout=timedelta(seconds=10))
total = torch.ones(1)
dist.all_reduce(total)
assert total.item() == 2
dist.destroy_process_group()
"""
