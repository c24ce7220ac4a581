"""Two hosts on this machine: network namespaces with a name, an address, a hosts file and an sshd of their own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "wire0"  # what the hosts share; both have a loopback, too
NEEDED = ("ip", "unshare", "ssh", "sshd", "ssh-keygen", "pdsh")
SBIN = ":/usr/sbin:/sbin"

SSHD = """\
HostKey {root}/host_key
AuthorizedKeysFile {root}/user_key.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin yes
"""
SSH = """\
IdentityFile {root}/user_key
IdentitiesOnly yes
UserKnownHostsFile /dev/null
StrictHostKeyChecking no
LogLevel ERROR
"""


@dataclass(frozen=True)
class Host:
    name: str
    address: str

    def inside(self, *command: str) -> list[str]:
        """The command as it is started on this host; the name of the machine is the host's, too."""
        named = f'hostname {self.name} && exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", named, self.name, *command]


def missing() -> str:
    """Why there can't be two hosts on this machine, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in NEEDED if not shutil.which(name, path=os.environ["PATH"] + SBIN)]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install iproute2 openssh-server pdsh)"
    probe = f"probe{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def two_hosts(root: Path) -> Iterator[tuple[Host, Host]]:
    """Both reach each other and nothing else. On leaving, all that runs in them is killed and they are gone.

    As on many a distribution, a host's own name is an address of its loopback: ranks that go by it do not meet.
    """
    number = os.getpid() % 250 + 1
    first, second = (Host(f"ax{os.getpid()}{side}", f"10.231.{number}.{n}") for n, side in ((1, "a"), (2, "b")))
    try:
        for host, other in ((first, second), (second, first)):
            _call("ip", "netns", "add", host.name)
            _call("ip", "-n", host.name, "link", "set", "lo", "up")
            own = Path("/etc/netns") / host.name / "hosts"
            own.parent.mkdir(parents=True)
            own.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{other.address} {other.name}\n")
        ends = ("netns", first.name, "type", "veth", "peer", "name", INTERFACE, "netns", second.name)
        _call("ip", "link", "add", INTERFACE, *ends)
        for host in (first, second):
            _call("ip", "-n", host.name, "address", "add", f"{host.address}/30", "dev", INTERFACE)
            _call("ip", "-n", host.name, "link", "set", INTERFACE, "up")
        _start_sshd(root, first, second)
        yield first, second
    finally:
        for host in (first, second):
            _remove(host)


def ssh_on_path(root: Path) -> Path:
    """A directory for PATH whose ssh knows the key of the hosts; nothing in ~/.ssh is touched."""
    (root / "ssh_config").write_text(SSH.format(root=root))
    wrapper = root / "bin" / "ssh"
    wrapper.parent.mkdir(exist_ok=True)
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {root}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    return wrapper.parent


def _start_sshd(root: Path, *hosts: Host) -> None:
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd locks itself up before a login
    for key in ("host_key", "user_key"):
        _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / key))
    (root / "sshd_config").write_text(SSHD.format(root=root))
    program = shutil.which("sshd", path=os.environ["PATH"] + SBIN)
    for host in hosts:
        _call(*host.inside(str(program), "-f", str(root / "sshd_config"), "-E", str(root / f"{host.name}.sshd.log")))


def _remove(host: Host) -> None:
    for _ in range(20):
        running = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=False)
        if not running.stdout.split():
            break
        for pid in running.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.1)
    subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)
    shutil.rmtree(Path("/etc/netns") / host.name, ignore_errors=True)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
