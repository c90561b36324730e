"""The listening socket: one route per accepted connection, from its first message to its end.

Enters: connections of anybody whom admission lets in. Leaves: first messages (HELLO, ATTACH) to the sessions, all later ones to their link.
Rule: who sent a message is the CURVE key that libzmq attaches to it (User-Id), never the routing id. A route belongs to one key, one
channel and, after its first message, one link. A refused first message is answered by a BYE with the reason, then the connection is cut.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

import zmq
import zmq.asyncio

from tscale_net import limits
from tscale_net.errors import Refused
from tscale_net.guard import Accepted, ConnectionGuard
from tscale_net.identity import Identity
from tscale_net.link import Link
from tscale_net.messages import Attach, Kind, bye_of, decode, encode
from tscale_net.ports import Channel, Clock
from tscale_net.sockets import endpoint, router
from tscale_net.tasks import TaskOwner
from tscale_net.wire import RouterWire, WireGone, has_mail


class Route:
    """One accepted connection."""

    def __init__(self, route_id: bytes, curve_key: bytes, accepted: Accepted | None, address: str, wire: RouterWire) -> None:
        self.route_id = route_id
        self.curve_key = curve_key
        self.accepted = accepted
        self.address = address
        self.wire = wire
        self.link: Link | None = None
        self.greeted = False
        """Whether its first message was accepted."""
        self.closed = False


class Receptionist(Protocol):
    """Who decides about first messages."""

    def hello_came(self, route: Route, wire_hello: bytes) -> None:
        """Accept and answer, or raise Refused."""
        ...

    def attach_came(self, route: Route, session: bytes) -> None:
        """Accept and answer, or raise Refused."""
        ...

    def route_gone(self, route: Route) -> None: ...

    def stranger_refused(self, refusal: Refused) -> None: ...

    async def may_read(self) -> None:
        """Waits while too much is unread."""
        ...


class Listener:
    """Owns the ROUTER socket and its guard."""

    def __init__(
        self, context: zmq.asyncio.Context, identity: Identity, clock: Clock, receptionist: Receptionist, tasks: TaskOwner
    ) -> None:
        self._tasks = tasks
        self._socket = router(context, identity)
        self._clock = clock
        self._receptionist = receptionist
        self._routes: dict[bytes, Route] = {}
        self.guard = ConnectionGuard(self._socket, clock, self._connection_gone, self._connection_cut)

    def start(self, listening: socket.socket) -> None:
        """Take over a listening TCP socket (it is closed with this listener)."""
        host, port = listening.getsockname()[:2]
        self._socket.use_fd = listening.detach()
        self._socket.bind(endpoint(host, port))

    async def run(self) -> None:
        """Read until cancelled."""
        handled = 0
        while True:
            await self._receptionist.may_read()
            parts = await self._socket.recv_multipart(copy=False)
            self._message(parts)
            handled += 1
            if handled % limits.READS_PER_TURN == 0:
                await asyncio.sleep(0)  # a future that is done does not give others a turn

    def _message(self, parts: list[zmq.Frame]) -> None:
        route = self._routes.get(parts[0].bytes) or self._new_route(parts)
        if route.accepted is not None:
            route.accepted.delivered += sum(len(part) for part in parts)
        if route.closed:
            return
        bodies = [part.buffer for part in parts[1:]]
        if route.link is not None:
            route.link.receive(bodies, route.wire.channel)
            return
        try:
            self._first_message(route, bodies)
        except Refused as refusal:
            self._receptionist.stranger_refused(refusal)
            self._turn_away(route, refusal)
        except WireGone:
            route.wire.close()

    def _new_route(self, parts: list[zmq.Frame]) -> Route:
        self.guard.catch_up()
        descriptor = _descriptor(parts[-1])
        accepted = self.guard.accepted(descriptor) if descriptor is not None else None
        address = accepted.address if accepted else str(_property(parts[-1], "Peer-Address") or "unknown address")
        curve_key = str(_property(parts[-1], "User-Id") or "").encode()
        route_id = parts[0].bytes
        wire = RouterWire(self._socket, route_id, self._clock, lambda flush_s: self._hang_up(route, flush_s))
        route = Route(route_id, curve_key, accepted, address, wire)
        self._routes[route_id] = route
        return route

    def _first_message(self, route: Route, bodies: list[memoryview]) -> None:
        header, body = route.wire.open(bodies)
        if route.greeted or header.kind not in (Kind.HELLO, Kind.ATTACH):
            raise Refused("no-hello", f"{route.address} sent a message of kind {header.kind} before its session stood.")
        if header.kind == Kind.HELLO:
            self._receptionist.hello_came(route, body)
        else:
            route.wire.channel = Channel.BULK
            self._receptionist.attach_came(route, decode(Attach, body).session)
        route.greeted = True
        if route.accepted is not None:
            route.accepted.welcome = True

    def _turn_away(self, route: Route, refusal: Refused) -> None:
        """Tell why, then cut."""
        try:
            route.wire.try_send(Kind.BYE, encode(bye_of(refusal.code, refusal.detail)))
        except WireGone:
            pass  # gone before it could hear the reason
        route.wire.close_later(limits.FLUSH_S)

    def _hang_up(self, route: Route, flush_s: float) -> None:
        route.closed = True
        route.link = None
        if route.accepted is None:
            return  # cannot be cut here; what it still sends is thrown away
        if flush_s > 0:
            asyncio.get_running_loop().call_later(flush_s, self.guard.cut, route.accepted)
        else:
            self.guard.cut(route.accepted)

    def _connection_gone(self, accepted: Accepted) -> None:
        for route in [route for route in self._routes.values() if route.accepted is accepted]:
            self._tasks.spawn(self._route_gone(route), f"end of {route.address}")

    async def _route_gone(self, route: Route) -> None:
        # What arrived before the end is still read: often it is the reason.
        deadline_s = self._clock.now() + limits.FLUSH_S
        while not self._socket.closed and has_mail(self._socket) and self._clock.now() < deadline_s:
            await self._clock.sleep(0)
        self._routes.pop(route.route_id, None)
        self._receptionist.route_gone(route)

    def _connection_cut(self, code: str, detail: str) -> None:
        self._receptionist.stranger_refused(Refused(code, detail))

    def close(self) -> None:
        """Stop listening and close all connections."""
        self.guard.close()
        self._socket.close(linger=0)


def _property(frame: zmq.Frame, name: str) -> str | None:
    try:
        value = frame.get(name)
    except zmq.ZMQError:
        return None
    return value if isinstance(value, str) else None


def _descriptor(frame: zmq.Frame) -> int | None:
    """Descriptor of the connection that a message came from; undocumented but present in libzmq 4.3.5, pinned by a test."""
    text = _property(frame, "__fd")
    return int(text) if text is not None and text.lstrip("-").isdigit() and int(text) >= 0 else None
