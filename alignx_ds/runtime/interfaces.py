"""The address and the network interface that lead to another host: a host's own name often resolves to its loopback."""

from __future__ import annotations

import ipaddress
import socket

import psutil


def address_towards(host: str) -> str:
    """This host's own address on the route to `host`; empty if the host is unknown."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing: it only looks up the route
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def interface_towards(host: str) -> str:
    """The name of the interface on the route to `host`; empty for the loopback or an unknown host."""
    own = address_towards(host)
    if not own or ipaddress.ip_address(own.split("%")[0]).is_loopback:
        return ""
    found = (name for name, addresses in psutil.net_if_addrs().items() if own in [a.address for a in addresses])
    return next(found, "")
