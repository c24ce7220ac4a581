"""Which network interface leads to another host: gloo goes by the host's own name, which often means the loopback."""

from __future__ import annotations

import ipaddress
import socket

import psutil


def interface_towards(address: str) -> str:
    """The name of the interface; empty where it is the loopback, or the address is unknown."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing: it only asks for the route
            own = str(probe.getsockname()[0])
    except OSError:
        return ""
    if ipaddress.ip_address(own.split("%")[0]).is_loopback:
        return ""
    found = (name for name, addresses in psutil.net_if_addrs().items() if own in [a.address for a in addresses])
    return next(found, "")
