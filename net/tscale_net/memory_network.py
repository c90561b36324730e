"""A network in memory: the twin of the encrypted transport, for tests and for simulations of whole swarms.

Enters: what peers send and dial, and what a test does to the network (partition, heal, kill, cut). Leaves: the events of `Transport`.

Rules, as on the real network: each link has two channels that keep their order, but not with each other; nothing is lost while a link
stands; what is in flight when a link ends is lost; a partition looks like silence and ends the link after `silence_s`, healing earlier
delivers what was held back; a killed process resets its connections. Messages leave through the sender's uplink one after the other
(`bandwidth_bytes_s`; control overtakes bulk). Delivery is by the loop's timers, so on a virtual loop a run is repeated exactly by its seed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Sequence

from tscale_net import limits
from tscale_net.errors import Refused
from tscale_net.identity import Identity
from tscale_net.memory_transport import MemoryTransport
from tscale_net.ports import Channel, Clock, Frame, LinkInfo, PeerId, Rng

_AFTER_S = 1e-6


class MemoryNetwork:
    """All peers of one simulated internet.

    `latency_s` is one way and drawn per link up to `jitter_s` higher; each message adds up to `jitter_s` more. `bandwidth_bytes_s` is
    each peer's uplink; None means that bytes take no time.
    """

    def __init__(
        self,
        rng: Rng,
        clock: Clock,
        *,
        latency_s: float = 0.04,
        jitter_s: float = 0.01,
        bandwidth_bytes_s: float | None = None,
        silence_s: float = limits.SILENCE_S,
    ) -> None:
        self.rng = rng
        self.clock = clock
        self.latency_s = latency_s
        self.jitter_s = jitter_s
        self.bandwidth_bytes_s = bandwidth_bytes_s
        self.silence_s = silence_s
        self.messages = 0
        """Messages delivered since the start."""
        self._hosts: dict[PeerId, str] = {}
        self._by_host: dict[str, MemoryTransport] = {}
        self._links: dict[tuple[PeerId, PeerId], MemoryLink] = {}
        self._group: dict[PeerId, int] = {}

    # --- peers --------------------------------------------------------------------------------------------------------------
    def transport(
        self, identity: Identity, name: str = "", run: bytes = b"", *, listens: bool = True, max_upload_bytes_s: float | None = None
    ) -> MemoryTransport:
        """A peer on this network. The same identity keeps its address when it is made again after `kill` or `close`."""
        host = self._hosts.setdefault(identity.peer_id, self._new_host())
        return MemoryTransport(self, identity, host, name=name, run=run, listens=listens, upload_bytes_s=max_upload_bytes_s)

    def _new_host(self) -> str:
        number = len(self._hosts) + 1
        return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"

    def listen(self, transport: MemoryTransport) -> None:
        """Called by a transport that starts to listen."""
        other = self._by_host.get(transport.host)
        if other is not None and other is not transport and not other.dead:
            raise Refused("port-taken", f"{transport.host}:{limits.DEFAULT_PORT} is in use. Stop the other peer or choose another port.")
        self._by_host[transport.host] = transport

    def listener(self, host: str) -> MemoryTransport | None:
        """Who answers at a host."""
        transport = self._by_host.get(host)
        return None if transport is None or transport.dead else transport

    def forget(self, transport: MemoryTransport) -> None:
        """Called by a transport that closes."""
        if self._by_host.get(transport.host) is transport:
            del self._by_host[transport.host]

    # --- links --------------------------------------------------------------------------------------------------------------
    def reaches(self, one: PeerId, other: PeerId) -> bool:
        """Whether packets pass between two peers now. Peers in no group reach everybody."""
        return one not in self._group or other not in self._group or self._group[one] == self._group[other]

    def one_way_s(self) -> float:
        """A one-way delay drawn now."""
        return self.latency_s + self.rng.uniform(0.0, self.jitter_s)

    def connect(self, dialler: MemoryTransport, listener: MemoryTransport) -> None:
        """Make the link between two peers; one that stands already is kept unless one of its ends is gone."""
        key = _pair(dialler.peer_id, listener.peer_id)
        stale = self._links.get(key)
        if stale is not None:
            if stale.joins(dialler, listener):
                return
            stale.end(f"{dialler.peer_id} connected again; the old session is gone.")
        link = MemoryLink(self, dialler, listener)
        self._links[key] = link
        link.up()

    def remove(self, link: MemoryLink) -> None:
        """Called by a link that ended."""
        key = _pair(*(end.peer_id for end in link.ends))
        if self._links.get(key) is link:
            del self._links[key]

    # --- what happens to networks ----------------------------------------------------------------------------------------------
    def partition(self, groups: Sequence[Collection[PeerId]]) -> None:
        """Let no packet pass between the groups; links between them fall silent and end after `silence_s`."""
        self._group = {peer: number for number, group in enumerate(groups) for peer in group}
        self._apply_groups()

    def heal(self) -> None:
        """Let everything pass again; links that still stand deliver what was held back."""
        self._group = {}
        self._apply_groups()

    def _apply_groups(self) -> None:
        for link in list(self._links.values()):
            link.block(not self.reaches(*(end.peer_id for end in link.ends)))

    def kill(self, peer: PeerId, silent: bool = False) -> None:
        """End a peer without a word: as SIGKILL (connections are reset), or as a power cut if `silent`."""
        host = self._hosts.get(peer)
        for link in [link for link in self._links.values() if peer in (end.peer_id for end in link.ends)]:
            link.lose(peer, self.silence_s if silent else self.one_way_s())
        if host in self._by_host:
            self._by_host.pop(host).die()

    def cut(self, one: PeerId, other: PeerId, reason: str = "The connection was reset.") -> bool:
        """End one link at both ends, losing what is in flight. False if there was none."""
        link = self._links.get(_pair(one, other))
        if link is None:
            return False
        link.end(reason)
        return True


class MemoryLink:
    """One link: two ends, two ordered channels in each direction."""

    def __init__(self, network: MemoryNetwork, dialler: MemoryTransport, listener: MemoryTransport) -> None:
        self.network = network
        self.ends = (dialler, listener)
        self.latency_s = network.one_way_s()
        self.alive = True
        self.blocked = False
        self._silence: asyncio.TimerHandle | None = None
        self._pipes = {(end.peer_id, channel): _Pipe(self, self.other(end), channel) for end in self.ends for channel in Channel}

    def joins(self, one: MemoryTransport, other: MemoryTransport) -> bool:
        """Whether this link stands between exactly these two, alive."""
        return self.alive and not self.blocked and {id(end) for end in self.ends} == {id(one), id(other)} and not (one.dead or other.dead)

    def other(self, end: MemoryTransport) -> MemoryTransport:
        """The far end."""
        return self.ends[1] if end is self.ends[0] else self.ends[0]

    def up(self) -> None:
        """Announce the link at both ends."""
        for end in self.ends:
            end.link_up(self, outgoing=end is self.ends[0])

    def send(self, sender: MemoryTransport, kind: int, body: bytes, channel: Channel) -> None:
        """Put a message on its way."""
        pipe = self._pipes[sender.peer_id, channel]
        departure_s = sender.departure(len(body), channel, pipe.receiver_id)
        pipe.put(kind, body, departure_s + self.latency_s + self.network.rng.uniform(0.0, self.network.jitter_s))

    def goodbye(self, sender: MemoryTransport, reason: str) -> None:
        """`sender` leaves: the far end learns it after everything that was sent before."""
        last_s = max(self._pipes[sender.peer_id, channel].last_s for channel in Channel)
        # Timers of the same moment have no order, hence a little later than the last message.
        arrival_s = max(self.network.clock.now() + self.latency_s, last_s) + _AFTER_S
        far = self.other(sender)
        sender.forget_link(self)
        if self.blocked:
            return
        self._later(arrival_s - self.network.clock.now(), lambda: self._end_at(far, f"The peer left: {reason}"))

    def lose(self, gone: PeerId, after_s: float) -> None:
        """One end vanished; the other notices later."""
        far = self.ends[1] if self.ends[0].peer_id == gone else self.ends[0]
        self._later(after_s, lambda: self._end_at(far, "The connection was lost."))

    def block(self, blocked: bool) -> None:
        """Begin or end a silence."""
        if blocked == self.blocked or not self.alive:
            return
        self.blocked = blocked
        if blocked:
            self._silence = self._later(self.network.silence_s, lambda: self.end(f"Nothing was heard for {self.network.silence_s:.0f} s."))
            return
        if self._silence is not None:
            self._silence.cancel()
        for pipe in self._pipes.values():
            pipe.flush()

    def end(self, reason: str) -> None:
        """End the link at both ends now."""
        for end in self.ends:
            self._end_at(end, reason)

    def _end_at(self, end: MemoryTransport, reason: str) -> None:
        self.alive = False
        self.network.remove(self)
        end.link_down(self, reason)

    def _later(self, seconds: float, action: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, action)

    def info(self, end: MemoryTransport) -> LinkInfo:
        """The link as one of its ends sees it."""
        far = self.other(end)
        up_bytes = sum(self._pipes[end.peer_id, channel].bytes for channel in Channel)
        down_bytes = sum(self._pipes[far.peer_id, channel].delivered_bytes for channel in Channel)
        address = f"{far.host}:{limits.DEFAULT_PORT}"
        return LinkInfo(far.peer_id, far.name, address, end is self.ends[0], 2 * self.latency_s, up_bytes, down_bytes)


class _Pipe:
    """One channel in one direction; first in, first out."""

    def __init__(self, link: MemoryLink, receiver: MemoryTransport, channel: Channel) -> None:
        self._link = link
        self._receiver = receiver
        self._sender_id = link.other(receiver).peer_id
        self.receiver_id = receiver.peer_id
        self._channel = channel
        self._queue: deque[tuple[int, bytes]] = deque()
        self._due = 0
        self.last_s = 0.0
        self.bytes = 0
        self.delivered_bytes = 0

    def put(self, kind: int, body: bytes, arrival_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.last_s = max(self.last_s, arrival_s)
        self.bytes += limits.HEADER_BYTES + len(body)
        self._queue.append((kind, body))
        loop.call_later(max(0.0, self.last_s - self._link.network.clock.now()), self._arrived)

    def _arrived(self) -> None:
        self._due += 1
        if not self._link.blocked:
            self.flush()

    def flush(self) -> None:
        while self._due and self._receiver.holds(self._link):
            self._due -= 1
            kind, body = self._queue.popleft()
            self.delivered_bytes += limits.HEADER_BYTES + len(body)
            self._link.network.messages += 1
            self._receiver.deliver(Frame(self._sender_id, kind, body, self._channel))


def _pair(one: PeerId, other: PeerId) -> tuple[PeerId, PeerId]:
    return (one, other) if one < other else (other, one)
