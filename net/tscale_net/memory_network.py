"""A network in memory: the twin of the encrypted transport, for tests and for simulations of whole swarms.

Enters: what peers send and dial, and what a test does to the network (partition, heal, kill, cut). Leaves: the events of `Transport`.

Rules, as on the real network: each link has two channels that keep their order, but not with each other; nothing is lost while a link
stands; what is in flight when a link ends is lost; a partition looks like silence and ends the link after `silence_s`, healing earlier
delivers what was held back; a killed process resets its connections. What each peer's line adds (rates, delay, loss) is in memory_link.py.
Delivery is by the loop's timers, so on a virtual loop a run is repeated exactly by its seed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from tscale_net import limits
from tscale_net.errors import Refused
from tscale_net.identity import Identity
from tscale_net.memory_link import Line, MemoryLink
from tscale_net.memory_transport import MemoryTransport
from tscale_net.ports import Clock, Moved, PeerId, Rng
from tscale_net.stall import Stall


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
        self.loop = asyncio.get_running_loop()
        self.messages = 0
        """Messages delivered since the start."""
        self.lives: dict[PeerId, list[Moved]] = {}
        """Bytes of each transport that an identity ever had here."""
        self._hosts: dict[PeerId, str] = {}
        self._by_host: dict[str, MemoryTransport] = {}
        self._links: dict[tuple[PeerId, PeerId], MemoryLink] = {}
        self._group: dict[PeerId, int] = {}

    # --- peers --------------------------------------------------------------------------------------------------------------
    def transport(
        self,
        identity: Identity,
        name: str = "",
        run: bytes = b"",
        *,
        listens: bool = True,
        max_upload_bytes_s: float | None = None,
        line: Line | None = None,
        stall: Stall | None = None,
        clock_ahead_s: float = 0.0,
    ) -> MemoryTransport:
        """A peer on this network. The same identity keeps its address when it is made again after `kill` or `close`. `line`: its way to
        the internet, if not the network's usual one; `stall`: it can stand still; `clock_ahead_s`: how
        wrong its wall clock is, which a handshake shows."""
        host = self._hosts.setdefault(identity.peer_id, self._new_host())
        line = line or Line(up_bytes_s=self.bandwidth_bytes_s)
        return MemoryTransport(
            self,
            identity,
            host,
            name=name,
            run=run,
            listens=listens,
            upload_bytes_s=max_upload_bytes_s,
            line=line,
            stall=stall,
            clock_ahead_s=clock_ahead_s,
        )

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

    def moved(self, peer: PeerId) -> Moved:
        """Bytes of one identity over all its lives."""
        lives = self.lives.get(peer, ())
        return Moved(sum(life.sent_bytes for life in lives), sum(life.received_bytes for life in lives))

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


def _pair(one: PeerId, other: PeerId) -> tuple[PeerId, PeerId]:
    return (one, other) if one < other else (other, one)
