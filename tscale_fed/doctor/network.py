"""This machine's network, without asking anybody: ports, IPv6, MTU, congestion control, libzmq.

Enters: what `measure_*` found. Leaves: lines. No packet leaves this machine.
"""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from tscale_fed.doctor import limits
from tscale_fed.doctor.report import Line
from tscale_net.limits import DEFAULT_PORT, LIBZMQ_MIN

CONGESTION_FILE = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")


def network_lines(port: int = DEFAULT_PORT) -> list[Line]:
    """All of this group. `port`: of the links; the next one is the hello door's."""
    import zmq

    return [
        port_line(port, [number for number in (port, port + 1) if not measure_port(number)]),
        ipv6_line(measure_ipv6()),
        mtu_line(measure_mtu()),
        congestion_line(measure_congestion()),
        libzmq_line(zmq.zmq_version_info(), bool(zmq.has("curve"))),
    ]


def port_line(port: int, taken: list[int]) -> Line:
    """`taken`: which of the two ports cannot be listened on."""
    if not taken:
        return Line("ports", "ok", f"TCP {port} and {port + 1} are free")
    names = " and ".join(str(number) for number in taken)
    fix = "stop what listens there, or choose others with --listen HOST:PORT; a peer that is no seed takes the next free pair"
    return Line("ports", "warn", f"TCP {names} cannot be listened on", fix)


def ipv6_line(has_route: bool) -> Line:
    if has_route:
        return Line("ipv6", "ok", "there is a route")
    return Line("ipv6", "warn", "no route: peers that have only IPv6 cannot be dialled", "switch IPv6 on in your router, if it can")


def mtu_line(mtus: dict[str, int]) -> Line:
    """Interface -> MTU, without loopback."""
    if not mtus:
        return Line("mtu", "warn", "no network interface is up", "connect this machine to a network; --solo trains without")
    name, smallest = min(mtus.items(), key=lambda item: item[1])
    if smallest < limits.MTU_WARN_BYTES:
        return Line("mtu", "warn", f"{smallest} bytes on {name}", f"set it to at least {limits.MTU_WARN_BYTES} (tunnel or VPN settings)")
    return Line("mtu", "ok", f"{smallest} bytes on {name}")


def congestion_line(allowed: list[str] | None) -> Line:
    """`allowed`: what TCP congestion controls programs may choose; None where the system does not tell."""
    if allowed is None:
        return Line(
            "congestion", "warn", "this system does not say; its default is used", "nothing; Linux with bbr is faster on lossy links"
        )
    if "bbr" in allowed:
        return Line("congestion", "ok", "bbr may be used")
    fix = "sysctl -w net.ipv4.tcp_allowed_congestion_control='bbr cubic reno' (after modprobe tcp_bbr)"
    return Line("congestion", "warn", f"only {' '.join(allowed)}: slow on links that lose packets", fix)


def libzmq_line(version: tuple[int, int, int], curve: bool) -> Line:
    found = f"{'.'.join(str(part) for part in version)}, {'with' if curve else 'without'} CURVE"
    if version < LIBZMQ_MIN or not curve:
        return Line("libzmq", "fail", found, "pip install -U pyzmq")
    return Line("libzmq", "ok", found)


def measure_port(port: int) -> bool:
    """Whether this machine lets us listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES, errno.EPERM):
                return False
            raise
    return True


def measure_ipv6() -> bool:
    """Whether there is a route to the IPv6 internet; a datagram socket is connected, nothing is sent."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.connect(("2001:4860:4860::8888", 9))
    except OSError:
        return False
    return True


def measure_mtu() -> dict[str, int]:
    """MTU of each interface that is up, without loopback."""
    import psutil

    return {
        name: state.mtu for name, state in psutil.net_if_stats().items() if state.isup and "loopback" not in state.flags and name != "lo"
    }


def measure_congestion() -> list[str] | None:
    try:
        return CONGESTION_FILE.read_text().split()
    except OSError:
        return None
