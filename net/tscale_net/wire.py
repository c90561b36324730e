"""One connection of a link: numbers what it sends, checks the numbers of what it receives.

Enters: kind and body, or the parts of an arrived message. Leaves: parts on a socket, or a checked header and body.
Two kinds: a `DealerWire` owns a socket that dialled; a `RouterWire` is one route of the listening socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import zmq
import zmq.asyncio

from tscale_net import frames, limits
from tscale_net.errors import Refused
from tscale_net.frames import Header
from tscale_net.ports import Channel, Clock

_COPY_BELOW_BYTES = 64 * limits.KIB
"""Below this libzmq copies a body; above it, it keeps a reference until it is sent."""


class WireGone(Exception):
    """The connection does not exist any more."""


def has_mail(socket: zmq.asyncio.Socket) -> bool:
    """Whether a message waits to be read from a socket."""
    events = socket.get(zmq.EVENTS)
    assert isinstance(events, int)
    return bool(events & zmq.POLLIN)


class Wire:
    """What both kinds share: the counters and the session in the header."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.session = frames.NO_SESSION
        """8 bytes; set when the session stands."""
        self._sent = 0
        self._received = 0

    def _header(self, kind: int, body: bytes) -> bytes:
        return frames.encode_header(kind, self._sent, self.session, len(body))

    def open(self, parts: Sequence[bytes | memoryview]) -> tuple[Header, bytes]:
        """Check an arrived message. Raises Refused; every message counts, also a refused one, so the numbers stay in step."""
        expected, self._received = self._received, self._received + 1
        header, body = frames.decode(parts, self.channel)
        if header.sequence != expected:
            raise Refused("bad-sequence", f"Message {header.sequence} came instead of {expected}; something was lost or injected.")
        if header.session != self.session:
            raise Refused("bad-session", "A message belongs to another session.")
        return header, body

    async def send(self, kind: int, body: bytes) -> None:
        """Hand a message to the socket, waiting for room. Raises WireGone."""
        raise NotImplementedError

    def close(self) -> None:
        """End the connection now. May be called twice."""
        raise NotImplementedError


class DealerWire(Wire):
    """A dialled connection."""

    def __init__(self, socket: zmq.asyncio.Socket, channel: Channel) -> None:
        super().__init__(channel)
        self.socket = socket
        self.before_close: Callable[[], None] | None = None

    async def send(self, kind: int, body: bytes) -> None:
        if self.socket.closed:
            raise WireGone
        header = self._header(kind, body)
        self._sent += 1
        await self.socket.send_multipart([header, body], copy=len(body) < _COPY_BELOW_BYTES)

    async def receive(self) -> tuple[Header, bytes]:
        """The next message, checked. Raises Refused."""
        return self.open(await self.socket.recv_multipart())

    def readable(self) -> bool:
        """Whether a message waits to be read."""
        return has_mail(self.socket)

    def close(self) -> None:
        if not self.socket.closed:
            if self.before_close is not None:
                self.before_close()
            self.socket.close(linger=0)


class RouterWire(Wire):
    """A connection that was accepted by the listening socket."""

    def __init__(self, socket: zmq.asyncio.Socket, route: bytes, clock: Clock, hang_up: Callable[[float], None]) -> None:
        super().__init__(Channel.CONTROL)  # until its first message says otherwise
        self._socket = socket
        self._route = route
        self._clock = clock
        self._hang_up = hang_up
        self._closed = False

    def try_send(self, kind: int, body: bytes) -> bool:
        """Send without waiting; False if the connection's queue is full. Raises WireGone."""
        if self._closed or self._socket.closed:
            raise WireGone
        parts = [self._route, self._header(kind, body), body]
        # With DONTWAIT pyzmq's future is done when it is returned.
        sent = self._socket.send_multipart(parts, flags=zmq.DONTWAIT, copy=len(body) < _COPY_BELOW_BYTES)
        error = sent.exception() if isinstance(sent, asyncio.Future) else None
        if error is None:
            self._sent += 1
            return True
        if isinstance(error, zmq.Again):
            return False
        if isinstance(error, zmq.ZMQError):  # EHOSTUNREACH: the connection ended
            raise WireGone from error
        raise error

    async def send(self, kind: int, body: bytes) -> None:
        while not self.try_send(kind, body):
            await self._clock.sleep(limits.ROUTER_RETRY_S)

    def close(self) -> None:
        self.close_later(0.0)

    def close_later(self, flush_s: float) -> None:
        """Send nothing more, and end the connection when what was sent had `flush_s` to leave."""
        if not self._closed:
            self._closed = True
            self._hang_up(flush_s)
