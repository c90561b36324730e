"""`ZmqTransport`: encrypted links between peers on real sockets, as the `Transport` of ports.py.

Enters: addresses to dial, messages to send. Leaves: events. This file only wires: sessions.py keeps the links, dials.py the dials;
handshake.py proves who is who; listener.py and dialler.py own the sockets; admission.py, guard.py and hello.py meet strangers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from tscale_net import hello as door
from tscale_net import limits
from tscale_net.address import Address, is_unspecified, parse, split_host_port
from tscale_net.address_book import AddressBook, FirstContact
from tscale_net.admission import Admission
from tscale_net.dialler import Dialler, resolve
from tscale_net.dials import Dial, Dials
from tscale_net.errors import Refused
from tscale_net.events import EventQueue
from tscale_net.frames import check_outgoing
from tscale_net.handshake import HelloGate, HelloMaker
from tscale_net.identity import Identity, curve_key_of, peer_id_of, public_key_of
from tscale_net.listener import Listener
from tscale_net.own_addresses import own_hosts
from tscale_net.ports import Channel, Clock, Event, LinkInfo, Moved, PeerId, Rng
from tscale_net.sessions import Sessions
from tscale_net.sockets import listening_pair, new_context
from tscale_net.tasks import TaskOwner
from tscale_net.token_bucket import TokenBucket


class ZmqTransport:
    """Links over ZeroMQ with CURVE.

    Args:
        identity: who this peer is.
        clock, rng: time, and randomness for timers (nonces come from the system).
        listen: "host:port" for links, with the hello door on the next port; port 0 takes the next free pair; None only dials.
        run: run id, 32 bytes, or empty for a newcomer; may be set later through the attribute `run`.
        name: shown to people; at most 64 characters are kept.
        max_upload_bytes_s: limit of what is sent in all; bulk waits for it, control only counts.
        advertise: addresses to tell others instead of what `listen` says (behind a port forwarding, for example).
        address_book: ids pinned by host:port; by default one that forgets.
        allowed: peer ids that are admitted; None admits everybody who is not banned.
        on_first_contact: called when an id was pinned; also kept in `first_contacts`.
    """

    def __init__(
        self,
        identity: Identity,
        clock: Clock,
        rng: Rng,
        listen: str | None = None,
        run: bytes = b"",
        name: str = "",
        max_upload_bytes_s: float | None = None,
        advertise: Sequence[str] = (),
        address_book: AddressBook | None = None,
        *,
        allowed: frozenset[PeerId] | None = None,
        on_first_contact: Callable[[FirstContact], None] | None = None,
    ) -> None:
        self.run = run
        self.first_contacts: list[FirstContact] = []
        self._identity = identity
        self._clock = clock
        self._rng = rng
        self._listen = listen
        self._advertise = list(advertise)
        self._book = address_book if address_book is not None else AddressBook()
        self._on_first_contact = on_first_contact
        self._name = "".join(character for character in name if character.isprintable())[: limits.NAME_CHARACTERS]
        self._events = EventQueue()
        self._tasks = TaskOwner(self._events.fail)
        self._context = new_context()
        self._admission = Admission(clock, allowed)
        self._maker = HelloMaker(identity, clock, self._name)
        gate = HelloGate(identity, clock)
        self._dials = Dials(identity.peer_id, self._tasks)
        self._dialler = Dialler(self._context, identity, self._maker, gate)
        upload = TokenBucket(max_upload_bytes_s, clock) if max_upload_bytes_s else None
        self._sessions = Sessions(
            clock, self._maker, gate, self._dials, self._admission, self._events, self._tasks, upload, lambda: self.run
        )
        self._listener: Listener | None = None
        self._door: door.HelloDoor | None = None
        self._started = False
        self._closed = False

    @property
    def peer_id(self) -> PeerId:
        return self._identity.peer_id

    @property
    def refused(self) -> dict[str, int]:
        """How often each reason code was refused here since the start."""
        return dict(self._events.refused)

    # --- start ----------------------------------------------------------------------------------------------------------------
    async def start(self) -> Sequence[str]:
        """See Transport.start. Raises Refused("port-taken", "cannot-listen", "bad-address")."""
        self._alive()
        if self._started:
            raise ValueError("a transport is started once")
        addresses = await self._start_listening() if self._listen is not None else []
        self._started = True
        self._maker.addresses = addresses
        self._tasks.spawn(self._keep_alive(), "keep alive")
        return addresses

    async def _start_listening(self) -> list[str]:
        assert self._listen is not None
        host, port = split_host_port(self._listen, allow_port_zero=True)
        bind_host = (await resolve(Address(host, port)))[0]
        links, visitors = listening_pair(bind_host, port)
        port = links.getsockname()[1]
        self._admission.start(self._context)
        self._tasks.spawn(self._admission.run(), "admission")
        self._listener = Listener(self._context, self._identity, self._clock, self._sessions, self._tasks)
        self._listener.start(links)
        self._tasks.spawn(self._listener.run(), "listener")
        self._tasks.spawn(self._listener.guard.run_monitor(), "guard monitor")
        self._tasks.spawn(self._guard(self._listener), "guard")
        self._door = door.HelloDoor(self._identity, self._clock, self._name, port, lambda: self.run, self._door_refused)
        await self._door.start(visitors)
        return [address.multiaddr for address in self._own_addresses(bind_host, port)]

    def _own_addresses(self, bind_host: str, port: int) -> list[Address]:
        if self._advertise:
            found = [parse(text) for text in self._advertise]
        elif is_unspecified(bind_host):
            found = [parse(Address(host, port).host_port) for host in own_hosts(bind_host)]
        else:
            found = [parse(Address(bind_host, port).host_port)]
        return [Address(address.host, address.port, self.peer_id, address.kind) for address in found]

    def _door_refused(self, code: str, detail: str) -> None:
        self._events.refuse(None, code, detail)

    # --- dial -----------------------------------------------------------------------------------------------------------------
    async def dial(self, address: str) -> PeerId:
        """See Transport.dial. A bare host:port asks the hello door first, and pins the id that then proves its key."""
        self._alive()
        target = parse(address)
        peer = target.peer_id if target.peer_id is not None else await self._ask_door(target)
        if peer == self.peer_id:
            raise Refused("self", f"{target} is this peer itself.")
        banned_s = self._admission.ban_left_s(curve_key_of(public_key_of(peer)))
        if banned_s > 0:
            raise Refused("banned", f"{peer} is banned here for {banned_s:.0f} s more.")
        if peer not in self._sessions.links:
            await self._dials.join(peer, lambda dial: self._dial(dial, target))
        if target.peer_id is None:
            self._pin(target.host_port, peer)
        return peer

    async def _ask_door(self, target: Address) -> PeerId:
        body = await door.ask(target, await resolve(target))
        peer = peer_id_of(body.public_key)
        self._book.check(target.host_port, peer)
        return peer

    def _pin(self, host_port: str, peer: PeerId) -> None:
        first = self._book.pin(host_port, peer, self._clock.wall())
        if first is not None:
            self.first_contacts.append(first)
            if self._on_first_contact is not None:
                self._on_first_contact(first)

    async def _dial(self, dial: Dial, target: Address) -> None:
        if self._sessions.is_accepting(dial.peer):
            raise Refused("duplicate-dial")

        def hello_sent() -> None:
            dial.hello_sent = True

        dialled = await self._dialler.dial(target, dial.peer, self.run, hello_sent)
        self._sessions.adopt(dial.peer, dialled, target.host_port)

    # --- traffic ----------------------------------------------------------------------------------------------------------------
    def send(self, peer: PeerId, kind: int, body: bytes, channel: Channel = Channel.CONTROL) -> bool:
        """See Transport.send. Raises Refused("too-large") for a body over the channel's limit and ValueError for a reserved kind."""
        check_outgoing(kind, body, channel)
        link = self._sessions.links.get(peer)
        return link is not None and link.send(kind, body, channel)

    def pending_bytes(self, peer: PeerId) -> int:
        """See Transport.pending_bytes."""
        link = self._sessions.links.get(peer)
        return link.pending_bytes() if link is not None else 0

    def drop(self, peer: PeerId, reason: str, ban_s: float = 0.0) -> None:
        """See Transport.drop. LinkDown with the reason is queued here as well."""
        if ban_s > 0:
            self._admission.ban(peer, ban_s)
        link = self._sessions.links.get(peer)
        if link is not None:
            self._sessions.dismiss(link, "banned" if ban_s > 0 else "dropped", reason)

    async def next_event(self) -> Event:
        """See Transport.next_event. Raises Refused("closed") when the transport is closed and all events were read, and the error of a
        background task that failed unexpectedly."""
        return await self._events.get()

    def links(self) -> Sequence[LinkInfo]:
        """See Transport.links."""
        return [link.info() for link in self._sessions.links.values()]

    @property
    def moved(self) -> Moved:
        """See Transport.moved."""
        return self._sessions.moved

    # --- time and end -----------------------------------------------------------------------------------------------------------
    async def _keep_alive(self) -> None:
        while True:
            # A little jitter keeps the pings of many peers from falling into step.
            await self._clock.sleep(limits.KEEP_ALIVE_TICK_S * self._rng.uniform(0.9, 1.1))
            self._sessions.tick()

    async def _guard(self, listener: Listener) -> None:
        before_s = self._clock.now()
        while True:
            await self._clock.sleep(limits.GUARD_TICK_S)
            now_s = self._clock.now()
            listener.guard.check(now_s - before_s, reading=not self._events.crowded)
            before_s = now_s

    async def close(self, linger_s: float = 0.0) -> None:
        """See Transport.close. Without linger queued messages are thrown away and only the BYE is given a moment."""
        if self._closed:
            return
        self._closed = True
        if self._door is not None:
            self._door.close()
        await self._sessions.close(linger_s)
        await self._tasks.close()
        self._sessions.stop_all()
        if self._listener is not None:
            self._listener.close()
        self._admission.close()
        self._events.close()
        # In a thread, since it blocks until libzmq's own thread has closed everything.
        await asyncio.get_running_loop().run_in_executor(None, self._context.term)

    def _alive(self) -> None:
        if self._closed:
            raise Refused("closed")
