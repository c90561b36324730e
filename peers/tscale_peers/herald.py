"""Own record: renewed each heartbeat, signed, and told onward together with everybody else's.

Enters: what this peer is doing now. Leaves: signed records for the links.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from tscale_net.ports import Clock, PeerId, Rng, Transport
from tscale_peers import limits
from tscale_peers.membership import Membership
from tscale_peers.messages import RECORDS, Records
from tscale_peers.records import PeerRecord, Sign, seal


class Herald:
    """Keeps this peer's word about itself fresh."""

    def __init__(self, membership: Membership, transport: Transport, sign: Sign, clock: Clock, rng: Rng) -> None:
        self.incarnation = int(clock.wall() * 1000)
        self.seq = 0
        self._membership = membership
        self._transport = transport
        self._sign = sign
        self._clock = clock
        self._rng = rng
        self._renew_at = 0.0
        self._renewed_at = 0.0
        self._stated: set[PeerId] = set()
        self._told_at = 0.0
        self.has_more = False
        """More was untold than one message to each neighbour holds."""
        self._outdone = False

    def outdone_by(self, record: PeerRecord) -> bool:
        """A record of this very peer with a later start was heard: its clock was set back since, or its identity runs elsewhere as well.
        The next renewal goes beyond it, else nobody would listen. True the first time."""
        self.incarnation, self.seq = min(record.incarnation + 1, limits.count_max), 0
        first, self._outdone = not self._outdone, True
        return first

    def due(self, linked: set[PeerId]) -> bool:
        """Is it time for a new word? A change of links since the last one is told soon."""
        now = self._clock.now()
        if now >= self._renew_at:
            return True
        pause_s = max(limits.links_renewed_s, self._membership.heartbeat_s() / limits.links_renewed_parts)
        return now >= self._renewed_at + pause_s and linked != self._stated

    def renew_soon(self) -> None:
        """The newest word lacks something that matters."""
        self._renew_at = 0.0

    def renew(self, record: PeerRecord, linked: set[PeerId]) -> None:
        """Take up `record` (with `incarnation` and the next `seq` of this herald) as the newest word; `linked`: whose links it states."""
        now = self._clock.now()
        self._renewed_at, self._stated = now, set(linked)
        self._renew_at = now + self._membership.heartbeat_s() * (0.9 + 0.2 * self._rng.random())
        self.seq = record.seq
        self._membership.learn(seal(record, self._sign), now)
        self._membership.urgent |= record.leaving

    def tell_if_due(self, linked: Iterable[PeerId]) -> None:
        """Tell what was gathered, once in a part of a heartbeat; at once if somebody has come or leaves."""
        now = self._clock.now()
        heartbeat_s = self._membership.heartbeat_s()
        may = now >= self._told_at + heartbeat_s / limits.urgent_parts
        if self.has_more or now >= self._told_at + heartbeat_s / limits.heartbeat_parts or (self._membership.urgent and may):
            self._membership.urgent = False
            self._told_at = now
            self.tell(linked)

    def tell(self, linked: Iterable[PeerId]) -> None:
        """Send each neighbour the records that it was not told yet."""
        self.has_more = False
        for peer in sorted(linked):
            news = self._membership.news_for(peer)
            if news:
                self._transport.send(peer, RECORDS, msgspec.msgpack.encode(Records(news)))
                self.has_more |= self._membership.has_more_for(peer)
