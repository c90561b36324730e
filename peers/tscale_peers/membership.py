"""Who is in the swarm: live, suspect, dead or left, judged by how lately each peer's signed record moved on.

Enters: records as they are heard, links going up and down, the time. Leaves: changes for people, who to tell what, whom to dial.
Rule: every peer renews its record each heartbeat and all relay it; a peer not heard of for `suspect_s` is suspect, for `dead_s` dead
(gossip-style failure detection, van Renesse 1998). Its own word (`leaving`) ends it at once. The event loop renews the record, not the
training thread, so a peer whose training stalls for seconds is not taken for dead. A dead peer is dialled again now and then, so that
partitions heal.
Pure state: the time and the random source are passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from tscale_net.errors import Refused
from tscale_net.ports import PeerId, Rng
from tscale_peers import limits
from tscale_peers.allowance import Allowance
from tscale_peers.records import PeerRecord, RecordBook


class State(StrEnum):
    LIVE = "live"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Change:
    """A peer's state moved on. `before` is None for a peer heard of for the first time."""

    peer: PeerId
    name: str
    before: State | None
    after: State


class Membership:
    """The view of one peer."""

    def __init__(self, me: PeerId, book: RecordBook, rng: Rng) -> None:
        self.me = me
        self.book = book
        self._rng = rng
        self._state: dict[PeerId, State] = {}
        book.pinned.add(me)
        self._told_by: dict[PeerId, Allowance] = {}
        self._untold: dict[PeerId, dict[PeerId, None]] = {}
        self._silent: set[PeerId] = set()
        """Linked, and no record has come over the link yet."""

    # -- records -----------------------------------------------------------------------------------------------------

    def learn(self, sealed: bytes, now: float, source: PeerId | None = None, wall: float | None = None) -> PeerRecord | None:
        """Take in one record; None if it is not news. Raises Refused for a false one, and "flood" for more than `source` may tell.

        wall: Unix time, by which old news is known (RecordBook.learn)."""
        told_by = self._told_by.get(source) if source is not None else None
        if told_by is not None and not told_by.take(1, now):
            raise Refused("flood", "more peer records than there can be peers")
        record = self.book.learn(sealed, now, wall)
        if record is not None:
            for neighbour, untold in self._untold.items():
                if neighbour not in (source, record.peer):
                    untold[record.peer] = None
        elif source in self._untold and self.book.outdates(sealed, source):
            # Its clock was set back since its last life, so nobody listens to it: it is told what is known of it, and goes beyond that.
            self._untold[source][source] = None
        return record

    def link_up(self, peer: PeerId) -> None:
        """A new neighbour is told of this peer, and of all others once it speaks: a newcomer that still fetches data would not hear it."""
        self._untold[peer] = {self.me: None}
        self._silent.add(peer)
        self._told_by[peer] = Allowance(limits.records_per_s, limits.records_burst)
        self.book.pinned.add(peer)

    def speaks(self, peer: PeerId) -> None:
        """A neighbour has sent records; the first time on its link it is told everything."""
        if peer in self._silent:
            self._silent.discard(peer)
            self._untold[peer] = {heard.record.peer: None for heard in self.book.all() if heard.record.peer != peer}

    def link_down(self, peer: PeerId) -> None:
        self._untold.pop(peer, None)
        self._silent.discard(peer)
        self._told_by.pop(peer, None)
        self.book.pinned.discard(peer)

    def news_for(self, neighbour: PeerId) -> list[bytes]:
        """Signed records that this neighbour was not told yet (bounded; the rest comes next time)."""
        untold = self._untold.get(neighbour)
        news: list[bytes] = []
        room = limits.records_bytes_max
        while untold and len(news) < limits.records_per_message:
            peer = next(iter(untold))
            heard = self.book.get(peer)
            if heard is not None and len(heard.sealed) > room:
                break
            del untold[peer]
            if heard is not None:
                news.append(heard.sealed)
                room -= len(heard.sealed)
        return news

    # -- states ------------------------------------------------------------------------------------------------------

    def heartbeat_s(self) -> float:
        """Seconds between renewals: longer in larger swarms, so that record traffic per peer stays bounded."""
        return max(limits.heartbeat_s, limits.heartbeat_per_peer_s * len(self.book))

    def state(self, peer: PeerId) -> State:
        return self._state.get(peer, State.DEAD)

    def tick(self, now: float) -> list[Change]:
        """Re-judge everybody; returns what changed since the last tick."""
        stretch = self.heartbeat_s() / limits.heartbeat_s
        changes = []
        if len(self._state) >= len(self.book):  # all but this peer itself have a state
            for forgotten in [peer for peer in self._state if peer not in self.book]:
                del self._state[forgotten]
        for heard in self.book.all():
            peer = heard.record.peer
            if peer == self.me:
                continue
            after = _judge(heard.record.leaving, (now - heard.heard_at) / stretch)
            before = self._state.get(peer)
            if after is not before:
                self._state[peer] = after
                changes.append(Change(peer, heard.record.name, before, after))
        return changes

    def live(self) -> list[PeerRecord]:
        """Records of the others that are live, in a fixed order."""
        return [self._record(p) for p, s in sorted(self._state.items()) if s is State.LIVE and p in self.book]

    def known(self) -> list[tuple[PeerRecord, State]]:
        return [(self._record(p), s) for p, s in sorted(self._state.items()) if p in self.book]

    def _record(self, peer: PeerId) -> PeerRecord:
        heard = self.book.get(peer)
        assert heard is not None
        return heard.record

    # -- whom to dial ------------------------------------------------------------------------------------------------

    def dial_targets(self, engaged: set[PeerId], now: float, may: Callable[[PeerId, float], bool]) -> list[PeerRecord]:
        """Reachable peers without a link, while fewer than `links_target` stand; the dead are tried too, at their long back-off."""
        room = limits.links_target - len(engaged)
        if room <= 0:
            return []
        free = [
            record
            for record, state in self.known()
            if record.addresses and state is not State.LEFT and record.peer not in engaged and may(record.peer, now)
        ]
        self._rng.shuffle(free)
        free.sort(key=lambda r: self._state[r.peer] is not State.LIVE)
        return free[: min(room, limits.dials_per_tick)]


def _judge(leaving: bool, silent_s: float) -> State:
    if leaving:
        return State.LEFT
    if silent_s >= limits.dead_s:
        return State.DEAD
    return State.SUSPECT if silent_s >= limits.suspect_s else State.LIVE
