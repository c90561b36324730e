"""At which addresses others may reach a peer that listens on all interfaces.

Enters: the bind address (0.0.0.0 or ::). Leaves: host addresses, the one from which this machine reaches the internet first. Loopback is
told to others only where there is nothing else: a peer on another machine that dials 127.0.0.1 finds itself.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator

VIRTUAL_INTERFACES = ("docker", "br-", "veth", "virbr", "cni", "flannel")
"""Names of interfaces that lead only into this machine; their addresses are the same on many machines."""
MOST_HOSTS = 4
"""Told to others: half of the addresses that a record may hold."""


def own_hosts(bind_host: str) -> list[str]:
    """Host addresses of the family of `bind_host`, at least one."""
    family = socket.AF_INET6 if ":" in bind_host else socket.AF_INET
    found = dict.fromkeys([*_outbound(family), *_of_interfaces(family)])
    return list(found)[:MOST_HOSTS] or ["::1" if family == socket.AF_INET6 else "127.0.0.1"]


def _outbound(family: socket.AddressFamily) -> Iterator[str]:
    """The address from which this machine reaches others, if there is a route; no packet is sent to find out."""
    far = "2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1"
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((far, 9))
        except OSError:
            return
        yield str(probe.getsockname()[0])


def _of_interfaces(family: socket.AddressFamily) -> Iterator[str]:
    """Addresses of interfaces that are up and lead out of this machine."""
    import psutil  # 10 ms; only who listens needs it

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        if name not in up or name.startswith(VIRTUAL_INTERFACES):
            continue
        for address in addresses:
            if address.family == family:
                ip = ipaddress.ip_address(address.address.partition("%")[0])
                if not (ip.is_loopback or ip.is_link_local or ip.is_unspecified):
                    yield str(ip)
