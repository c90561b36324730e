"""`Transport` in memory: one peer of a `MemoryNetwork`.

Same events, refusals and bounds as the encrypted one; nothing is encrypted on the way, since nothing leaves the process.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tscale_net import limits
from tscale_net.address import parse
from tscale_net.address_book import AddressBook
from tscale_net.errors import Refused
from tscale_net.events import EventQueue
from tscale_net.frames import check_outgoing
from tscale_net.identity import Identity
from tscale_net.memory_link import Line
from tscale_net.ports import Channel, Event, Frame, LinkDown, LinkInfo, LinkUp, Moved, PeerId
from tscale_net.stall import Stall
from tscale_net.token_bucket import TokenBucket

if TYPE_CHECKING:
    from tscale_net.memory_link import MemoryLink
    from tscale_net.memory_network import MemoryNetwork


class MemoryTransport:
    """Made by `MemoryNetwork.transport`."""

    def __init__(
        self,
        network: MemoryNetwork,
        identity: Identity,
        host: str,
        *,
        name: str,
        run: bytes,
        listens: bool,
        upload_bytes_s: float | None,
        line: Line,
        stall: Stall | None,
        clock_ahead_s: float,
    ) -> None:
        self.identity = identity
        self.peer_id = identity.peer_id
        self.line = line
        self.clock_ahead_s = clock_ahead_s
        self.moved = Moved()
        network.lives.setdefault(identity.peer_id, []).append(self.moved)
        self._stall = stall
        self.host = host
        self.host_port = f"{host}:{limits.DEFAULT_PORT}"
        self.name = name
        self.run = run
        self.dead = False
        self.address_book = AddressBook()
        self._network = network
        self._listens = listens
        self._links: dict[PeerId, MemoryLink] = {}
        self._dials: dict[PeerId, asyncio.Future[None]] = {}
        self._bans: dict[PeerId, float] = {}
        self._queue = EventQueue()
        self._uplink_free_s = 0.0
        self._downlink_free_s = 0.0
        self._upload = TokenBucket(upload_bytes_s, network.clock) if upload_bytes_s else None
        self._pending: dict[PeerId, deque[tuple[float, int]]] = {}
        """Bulk on its way out, to each link: when it has left, and its bytes."""
        self._pending_bytes: dict[PeerId, int] = {}

    # --- Transport ----------------------------------------------------------------------------------------------------------
    @property
    def refused(self) -> dict[str, int]:
        """How often each reason code was refused here."""
        return dict(self._queue.refused)

    async def start(self) -> Sequence[str]:
        """See Transport.start."""
        if not self._listens:
            return []
        self._network.listen(self)
        return [f"/ip4/{self.host}/tcp/{limits.DEFAULT_PORT}/p2p/{self.peer_id}"]

    async def dial(self, address: str) -> PeerId:
        """See Transport.dial."""
        target = parse(address)
        self._alive()
        if target.peer_id == self.peer_id or target.host == self.host:
            raise Refused("self", f"{address} is this peer itself.")
        if target.peer_id is not None and target.peer_id in self._links:
            return target.peer_id
        network = self._network
        await network.clock.sleep(network.one_way_s())
        far = network.listener(target.host)
        if far is None or not network.reaches(self.peer_id, far.peer_id):
            if far is not None:
                await network.clock.sleep(limits.CONNECT_TIMEOUT_S)
            raise Refused("unreachable", f"Tried {target.host_port}: no answer. Check host, port and that the peer runs.")
        if target.peer_id is not None and target.peer_id != far.peer_id:
            raise Refused("wrong-key", f"The peer at {target.host_port} is not {target.peer_id}. Check the address.")
        await self._handshake(far)
        if target.peer_id is None:
            self.address_book.pin(target.host_port, far.peer_id, network.clock.wall())
        return far.peer_id

    async def _handshake(self, far: MemoryTransport) -> None:
        """Two more one-way delays, then both ends have the link. Of two dials between two peers the first to finish makes the one link."""
        network = self._network
        await network.clock.sleep(network.one_way_s() + network.one_way_s())
        self._alive()
        if far.dead or not network.reaches(self.peer_id, far.peer_id):
            raise Refused("unreachable", f"The peer at {far.host} went away during the handshake. Try again.")
        skew_s = abs(self.clock_ahead_s - far.clock_ahead_s)
        if skew_s > limits.CLOCK_WINDOW_S:
            both = f"The two clocks differ by {skew_s:.0f} s, more than {limits.CLOCK_WINDOW_S:.0f} s are not accepted."
            raise Refused("clock-skew", f"{both} Set both (NTP).")
        if far.ban_left_s(self.peer_id) > 0:
            raise Refused("not-admitted", f"The peer at {far.host} does not admit this identity (it is banned there).")
        if self.ban_left_s(far.peer_id) > 0:
            raise Refused("banned", f"{far.peer_id} is banned here for {self.ban_left_s(far.peer_id):.0f} s more.")
        if self.run and far.run and self.run != far.run:
            detail = f"{self.peer_id} belongs to run {self.run.hex()[:16]}, this peer to {far.run.hex()[:16]}."
            far._queue.refuse(self.peer_id, "wrong-run", detail)
            raise Refused("wrong-run", f"The peer at {far.host} belongs to run {far.run.hex()[:16]}, this peer to {self.run.hex()[:16]}.")
        network.connect(self, far)

    def send(self, peer: PeerId, kind: int, body: bytes, channel: Channel = Channel.CONTROL) -> bool:
        """See Transport.send."""
        check_outgoing(kind, body, channel)
        link = self._links.get(peer)
        if link is None or self.dead:
            return False
        if channel is Channel.BULK:
            if self.pending_bytes(peer) + len(body) > limits.BULK_QUEUE_BYTES:
                return False
        link.pipe(self.peer_id, channel).put(kind, body)
        return True

    def pending_bytes(self, peer: PeerId) -> int:
        """See Transport.pending_bytes."""
        waiting = self._pending.get(peer)
        if not waiting:
            return 0
        now_s = self._network.clock.now()
        while waiting and waiting[0][0] <= now_s:
            self._pending_bytes[peer] -= waiting.popleft()[1]
        return self._pending_bytes[peer]

    def drop(self, peer: PeerId, reason: str, ban_s: float = 0.0) -> None:
        """See Transport.drop."""
        if ban_s > 0:
            self._bans[peer] = self._network.clock.now() + ban_s
        link = self._links.get(peer)
        if link is not None:
            link.goodbye(self, reason)
            self._queue.put(LinkDown(peer, reason))

    async def next_event(self) -> Event:
        """See Transport.next_event. Raises Refused("closed") when the transport is closed and all events were read."""
        event = await self._queue.get()
        if self._stall is not None:
            await self._stall.over()
        return event

    def links(self) -> Sequence[LinkInfo]:
        """See Transport.links."""
        return [link.info(self) for link in self._links.values()]

    async def close(self, linger_s: float = 0.0) -> None:
        """See Transport.close."""
        if self.dead:
            return
        deadline_s = self._network.clock.now() + linger_s
        while any(self.pending_bytes(peer) for peer in self._links) and self._network.clock.now() < deadline_s:
            await self._network.clock.sleep(limits.SERVE_RETRY_S)
        for link in list(self._links.values()):
            link.goodbye(self, "it was stopped")
        self._network.forget(self)
        self.die()

    # --- called by the network ------------------------------------------------------------------------------------------------
    def through_uplink(self, size: int, took_s: float, now_s: float) -> float:
        """When a bulk message handed over now has left through the uplink, in clock seconds."""
        held_s = self._upload.reserve(size) if self._upload else 0.0
        self._uplink_free_s = max(now_s + held_s, self._uplink_free_s) + took_s
        return self._uplink_free_s

    def note_pending(self, peer: PeerId, left_s: float, size: int) -> None:
        """A bulk message to `peer` will have left at this time."""
        self._pending.setdefault(peer, deque()).append((left_s, size))
        self._pending_bytes[peer] = self._pending_bytes.get(peer, 0) + size

    def through_downlink(self, took_s: float, now_s: float) -> float:
        """How long a bulk message that is at the provider now waits for the downlink and passes it, in seconds."""
        self._downlink_free_s = max(now_s, self._downlink_free_s) + took_s
        return self._downlink_free_s - now_s

    def holds(self, link: MemoryLink) -> bool:
        """Whether this end still has the link."""
        return not self.dead and self._links.get(link.other(self).peer_id) is link

    def link_up(self, link: MemoryLink, outgoing: bool) -> None:
        """A link stands."""
        far = link.other(self)
        self._links[far.peer_id] = link
        self._queue.put(LinkUp(far.peer_id, far.name, far.run, far.host_port, outgoing))

    def link_down(self, link: MemoryLink, reason: str) -> None:
        """A link ended at this end."""
        if self.forget_link(link):
            self._queue.put(LinkDown(link.other(self).peer_id, reason))

    def forget_link(self, link: MemoryLink) -> bool:
        """Remove a link; False if it was not held."""
        peer = link.other(self).peer_id
        if self._links.get(peer) is not link:
            return False
        del self._links[peer]
        self._pending.pop(peer, None)
        self._pending_bytes.pop(peer, None)
        return True

    def deliver(self, frame: Frame) -> None:
        """A message arrived."""
        self._queue.put(frame)

    def ban_left_s(self, peer: PeerId) -> float:
        """Seconds for which a peer is still refused here."""
        return max(0.0, self._bans.get(peer, 0.0) - self._network.clock.now())

    def die(self) -> None:
        """Stop without a word."""
        self.dead = True
        self._links.clear()
        self._queue.close()

    def _alive(self) -> None:
        if self.dead:
            raise Refused("closed")
