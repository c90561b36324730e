"""What libzmq does not guard: how many TCP connections there are, who they are from, and how much they may leave unfinished in memory.

Enters: monitor events of the listening socket, the descriptor that every received message carries, delivered byte counts. Leaves: cuts of
single connections, and calls when a connection is gone.

Rules: caps in total, per IP and per network (/24, /64) at accept; a connection without HELLO within the limit is cut; one that received
much more than it delivered holds an unfinished multi-part message, which libzmq would let grow without bound, and is cut. A cut is
shutdown() on a duplicate of the descriptor; since descriptors are reused, the far address is compared first.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Callable

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from tscale_net import limits
from tscale_net.address import is_loopback
from tscale_net.ports import Clock
from tscale_net.wire import has_mail

_TCP_INFO_BYTES = 232
_TCP_INFO_BYTES_RECEIVED_OFFSET = 128
_GONE = frozenset({zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED, zmq.EVENT_CLOSE_FAILED})


class Accepted:
    """One TCP connection inside libzmq."""

    def __init__(self, descriptor: int, far: tuple[str, int], now_s: float) -> None:
        self.descriptor = descriptor
        self.far = far
        self.network = network_of(far[0])
        self.since_s = now_s
        self.welcome = False
        """Whether its first message was accepted."""
        self.delivered = 0
        self._received = 0
        self._excess = 0.0

    @property
    def address(self) -> str:
        """`ip:port` of the far end."""
        host, port = self.far
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def measure(self, received: int, elapsed_s: float) -> float:
        """Bytes received but not delivered, less what overhead explains."""
        growth = (received - self._received) - self.delivered
        self._received, self.delivered = received, 0
        self._excess = max(0.0, self._excess + growth - elapsed_s * limits.UNDELIVERED_LEAK_BYTES_S)
        return self._excess


class ConnectionGuard:
    """Watches the connections of one listening socket."""

    def __init__(
        self, router: zmq.asyncio.Socket, clock: Clock, on_gone: Callable[[Accepted], None], on_cut: Callable[[str, str], None]
    ) -> None:
        self._router = router
        self._monitor = router.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        self._clock = clock
        self._on_gone = on_gone
        self._on_cut = on_cut
        self._live: dict[int, Accepted] = {}

    def __len__(self) -> int:
        return len(self._live)

    async def run_monitor(self) -> None:
        """Follow connections until cancelled."""
        while True:
            self._event(await self._monitor.recv_multipart())

    def catch_up(self) -> None:
        """Handle the events that are there already: a connection must be known before its first message is handled, and its end before the
        descriptor is met again."""
        plain: zmq.Socket[bytes] = zmq.Socket.shadow(self._monitor)
        while has_mail(self._monitor):
            self._event(plain.recv_multipart(flags=zmq.DONTWAIT))

    def accepted(self, descriptor: int) -> Accepted | None:
        """The connection behind the descriptor that came with a message."""
        return self._live.get(descriptor)

    def _event(self, parts: list[bytes]) -> None:
        event = parse_monitor_message(parts)
        descriptor = int(event["value"])
        if event["event"] == zmq.EVENT_ACCEPTED:
            self._accept(descriptor)
        elif event["event"] in _GONE:
            gone = self._live.pop(descriptor, None)
            if gone is not None:
                self._on_gone(gone)

    def _accept(self, descriptor: int) -> None:
        far = _far_address(descriptor)
        if far is None:
            return  # gone already
        self._live.pop(descriptor, None)
        accepted = Accepted(descriptor, far, self._clock.now())
        of_ip = sum(1 for other in self._live.values() if other.far[0] == far[0])
        network = network_of(far[0])
        of_network = sum(1 for other in self._live.values() if other.network == network)
        self._live[descriptor] = accepted
        crowd = of_ip >= limits.CONNECTIONS_PER_IP or of_network >= limits.CONNECTIONS_PER_NETWORK
        if len(self._live) > limits.CONNECTIONS_TOTAL or (crowd and not is_loopback(far[0])):
            counts = f"{len(self._live)} in all, {of_ip + 1} from {far[0]}, {of_network + 1} from {network}"
            self.cut(accepted, "too-many", f"Too many connections ({counts}); the newest was cut.")

    def check(self, elapsed_s: float, reading: bool) -> None:
        """Called every guard tick. `reading` is False while this side holds messages back itself."""
        now_s = self._clock.now()
        for accepted in list(self._live.values()):
            if not accepted.welcome and now_s - accepted.since_s > limits.CONNECT_TIMEOUT_S + limits.HELLO_TIMEOUT_S:
                self.cut(accepted, "no-hello", f"{accepted.address} sent no HELLO in time.")
            elif reading and (received := _received_bytes(accepted)) is not None:
                excess = accepted.measure(received, elapsed_s)
                if excess > limits.UNDELIVERED_BYTES:
                    self.cut(accepted, "undelivered", f"{accepted.address} holds {excess / limits.MIB:.0f} MiB of an unfinished message.")

    def cut(self, accepted: Accepted, code: str = "", detail: str = "") -> None:
        """Shut one connection down; the others notice nothing. With a code the cut is reported."""
        if self._live.get(accepted.descriptor) is not accepted:
            return
        if code:
            self._on_cut(code, detail)
        if _far_address(accepted.descriptor) != accepted.far:
            return
        try:
            with socket.socket(fileno=os.dup(accepted.descriptor)) as connection:
                connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it ended in the same moment
        accepted.welcome = True  # do not cut twice while libzmq notices

    def close(self) -> None:
        """Stop watching."""
        self._router.disable_monitor()
        self._monitor.close(linger=0)


def network_of(host: str) -> str:
    """The IPv4 /24 or IPv6 /64 of an IP address: what one customer of a provider can take all addresses of."""
    try:
        prefix_bits = 64 if ":" in host else 24
        return str(ipaddress.ip_network(f"{host.partition('%')[0]}/{prefix_bits}", strict=False))
    except ValueError:
        return host


def _far_address(descriptor: int) -> tuple[str, int] | None:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            name = connection.getpeername()
    except OSError:
        return None
    if not isinstance(name, tuple):
        return None
    host = str(name[0])
    return (host.removeprefix("::ffff:"), int(name[1]))


def _received_bytes(accepted: Accepted) -> int | None:
    """TCP's own count of received bytes; None where the system does not tell."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None:
        return None
    try:
        with socket.socket(fileno=os.dup(accepted.descriptor)) as connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, option, _TCP_INFO_BYTES)
    except OSError:
        return None
    if len(info) < _TCP_INFO_BYTES_RECEIVED_OFFSET + 8:
        return None
    return int(struct.unpack_from("=Q", info, _TCP_INFO_BYTES_RECEIVED_OFFSET)[0])
