"""All sessions of one transport: strangers become links here, links end here, and what links carry becomes events.

Enters: first messages from the listener, finished dials, messages and ends of links. Leaves: events. Rule: one link per peer; a new session
with the same peer replaces the old one in one step, LinkDown before LinkUp.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from tscale_net import limits
from tscale_net.admission import Admission
from tscale_net.dialler import Dealing, Dialled
from tscale_net.dials import Dials
from tscale_net.errors import Refused
from tscale_net.events import EventQueue
from tscale_net.handshake import HelloGate, HelloMaker
from tscale_net.identity import peer_id_of
from tscale_net.link import Link
from tscale_net.listener import Route
from tscale_net.messages import Attach, HelloBody, Kind, encode
from tscale_net.ports import Channel, Clock, Frame, LinkDown, LinkUp, Moved, PeerId
from tscale_net.tasks import TaskOwner
from tscale_net.token_bucket import TokenBucket
from tscale_net.wire import Wire, WireGone

_LOST = "The connection was lost."
_REPLACED = "The peer connected again; the old session is gone."
_FATAL = frozenset({"bad-sequence", "bad-session"})
"""After these nothing on the link can be trusted to be complete."""


@dataclass(slots=True)
class _Accepting:
    """A control connection whose HELLO was accepted and whose bulk connection is awaited."""

    peer: PeerId
    hello: HelloBody
    route: Route
    since_s: float


class Sessions:
    """Implements `Receptionist` for the listener and `LinkOwner` for the links."""

    def __init__(
        self,
        clock: Clock,
        maker: HelloMaker,
        gate: HelloGate,
        dials: Dials,
        admission: Admission,
        events: EventQueue,
        tasks: TaskOwner,
        upload: TokenBucket | None,
        run: Callable[[], bytes],
    ) -> None:
        self.links: dict[PeerId, Link] = {}
        self.moved = Moved()
        self._clock = clock
        self._maker = maker
        self._gate = gate
        self._dials = dials
        self._admission = admission
        self._events = events
        self._tasks = tasks
        self._upload = upload
        self._run = run
        self._accepting: dict[bytes, _Accepting] = {}
        self._leaving: dict[Link, None] = {}
        """Ended here, but their connections stand until the BYE was read."""

    # --- first messages (Receptionist) --------------------------------------------------------------------------------------
    def hello_came(self, route: Route, wire_hello: bytes) -> None:
        """Check a HELLO and answer it, or raise Refused."""
        hello = self._gate.check(wire_hello, route.curve_key, self._run())
        peer = peer_id_of(hello.public_key)
        self._check_ban(peer, route)
        link = self.links.get(peer)
        earlier = [accepting for accepting in self._accepting.values() if accepting.peer == peer]
        standing = link.hello if link else None
        for accepting in earlier:
            self._dials.verdict(peer, hello, accepting.hello)
        self._dials.verdict(peer, hello, standing)
        self._dials.give_up(peer)
        answer = self._maker.make(hello.public_key, self._run(), answered=hello)
        if not route.wire.try_send(Kind.HELLO, answer.wire):
            raise WireGone
        for accepting in earlier:
            self._forget(accepting)
        self._accepting[hello.session] = _Accepting(peer, hello, route, self._clock.now())

    def attach_came(self, route: Route, session: bytes) -> None:
        """Join a bulk connection to its session, which then stands; or raise Refused."""
        accepting = self._accepting.get(session)
        if accepting is None or accepting.route.curve_key != route.curve_key or accepting.route.closed:
            raise Refused("bad-session", f"{route.address} wants to join a session that does not exist.")
        del self._accepting[session]
        self._check_ban(accepting.peer, route)
        if not route.wire.try_send(Kind.ATTACHED, encode(Attach(session))):
            raise WireGone
        wires: dict[Channel, Wire] = {Channel.CONTROL: accepting.route.wire, Channel.BULK: route.wire}
        link = self._new_link(accepting.peer, accepting.hello, wires, accepting.route.address, outgoing=False)
        accepting.route.link = route.link = link
        self._stand(link)

    def _check_ban(self, peer: PeerId, route: Route) -> None:
        banned_s = self._admission.ban_left_s(route.curve_key)
        if banned_s > 0:
            raise Refused("banned", f"{peer} is banned here for {banned_s:.0f} s more.")

    def route_gone(self, route: Route) -> None:
        """An accepted connection ended."""
        if route.link is not None:
            route.link.connection_lost(_LOST)
        for accepting in [accepting for accepting in self._accepting.values() if accepting.route is route]:
            self._forget(accepting)

    def stranger_refused(self, refusal: Refused) -> None:
        """Somebody without a session was turned away."""
        if refusal.code != "duplicate-dial":  # a crossing of dials is nobody's fault
            self._events.refuse(None, refusal.code, refusal.detail)

    async def may_read(self) -> None:
        """Wait while too much is unread."""
        await self._events.room()

    def is_accepting(self, peer: PeerId) -> bool:
        """Whether a session dialled by `peer` is about to stand."""
        return any(accepting.peer == peer for accepting in self._accepting.values())

    def _forget(self, accepting: _Accepting) -> None:
        self._accepting.pop(accepting.hello.session, None)
        accepting.route.wire.close()

    # --- links ----------------------------------------------------------------------------------------------------------------
    def adopt(self, peer: PeerId, dialled: Dialled, address: str) -> None:
        """Make the link of a finished dial."""
        wires: dict[Channel, Wire] = {channel: dealing.wire for channel, dealing in dialled.dealings.items()}
        link = self._new_link(peer, dialled.hello, wires, address, outgoing=True)
        self._stand(link)
        for channel, dealing in dialled.dealings.items():
            self._tasks.spawn(self._read(link, dealing, channel), f"read {channel.name} of {peer[-6:]}")
            self._tasks.spawn(self._watch(link, dealing), f"watch {channel.name} of {peer[-6:]}")

    def _new_link(self, peer: PeerId, hello: HelloBody, wires: dict[Channel, Wire], address: str, outgoing: bool) -> Link:
        return Link(
            peer, hello, wires,
            address=address, outgoing=outgoing, owner=self, clock=self._clock, upload=self._upload, moved=self.moved,
        )  # fmt: skip

    def _stand(self, link: Link) -> None:
        old = self.links.get(link.peer)
        if old is not None:
            old.end(_REPLACED)
        self.links[link.peer] = link
        link.start(self._tasks)
        self._events.put(LinkUp(link.peer, link.hello.name, link.hello.run, link.address, link.outgoing))
        self._dials.link_stands(link.peer)

    async def _read(self, link: Link, dealing: Dealing, channel: Channel) -> None:
        handled = 0
        while not dealing.socket.closed:
            await self._events.room()
            parts = await dealing.socket.recv_multipart(copy=False)
            link.receive([part.buffer for part in parts], channel)
            handled += 1
            if handled % limits.READS_PER_TURN == 0:
                await asyncio.sleep(0)  # a future that is done does not give others a turn

    async def _watch(self, link: Link, dealing: Dealing) -> None:
        await dealing.lost()
        # What arrived before the end is still read: often it is the reason.
        deadline_s = self._clock.now() + limits.FLUSH_S
        while not dealing.socket.closed and dealing.wire.readable() and self._clock.now() < deadline_s:
            await self._clock.sleep(0)
        link.connection_lost(_LOST)

    def dismiss(self, link: Link, code: str, detail: str) -> None:
        """End a link after a BYE."""
        if not link.ended:
            link.goodbye(code, detail)
            self._leaving[link] = None
            self._tasks.spawn(self._see_out(link), f"see out {link.peer[-6:]}")

    async def _see_out(self, link: Link) -> None:
        try:
            async with asyncio.timeout(limits.FLUSH_S):
                await link.finished.wait()
        except TimeoutError:
            pass  # the connection is stuck; the BYE is a courtesy
        link.stop()
        self._leaving.pop(link, None)

    def stop_all(self) -> None:
        """Close every connection that is left, once no task runs that would: of links whose BYE was not read, and of dials that came
        through while others were seen out. One open socket keeps the context from ending, and its reader callback busy, for ever."""
        for link in [*self._leaving, *self.links.values()]:
            link.stop()
        self._leaving.clear()
        self.links.clear()

    async def close(self, linger_s: float) -> None:
        """Say BYE on all links and wait until the peers have read it, at most `linger_s`. No LinkDown is queued."""
        links = list(self.links.values())
        self.links.clear()
        for link in links:
            link.say_bye("leave", "it was stopped", discard=linger_s <= 0)
        if links:
            waits = [asyncio.ensure_future(link.finished.wait()) for link in links]
            _, stuck = await asyncio.wait(waits, timeout=max(linger_s, limits.FLUSH_S))
            for wait in stuck:
                wait.cancel()
        for link in links:
            link.stop()

    def tick(self) -> None:
        """Called about once a second."""
        for link in list(self.links.values()):
            link.tick(reading=not self._events.crowded)
        now_s = self._clock.now()
        for accepting in list(self._accepting.values()):
            if now_s - accepting.since_s > limits.HELLO_TIMEOUT_S:
                self._forget(accepting)

    # --- what links tell (LinkOwner) --------------------------------------------------------------------------------------------
    def frame_came(self, link: Link, kind: int, body: bytes, channel: Channel) -> None:
        """An application message."""
        self._events.put(Frame(link.peer, kind, body, channel))

    def frame_refused(self, link: Link, refusal: Refused) -> None:
        """A malformed message: counted; after a few of them, or a fatal one, the peer is sent away."""
        self._events.refuse(link.peer, refusal.code, refusal.detail)
        if link.worn_out:
            self._admission.ban(link.peer, limits.STRIKE_BAN_S)
            self.dismiss(link, "banned", f"{limits.STRIKES} malformed messages, the last: {refusal.detail}")
        elif refusal.code in _FATAL:
            self.dismiss(link, refusal.code, refusal.detail)

    def link_ended(self, link: Link, reason: str) -> None:
        """A link is over."""
        if self.links.get(link.peer) is link:
            del self.links[link.peer]
            self._events.put(LinkDown(link.peer, reason))
