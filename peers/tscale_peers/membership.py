"""Who is in the swarm: live, suspect, dead or left, judged by links that peers state and by how lately their signed records moved on.

Enters: records as they are heard, links going up and down, the time. Leaves: changes for people, who to tell what, whom to dial.
Rule: whoever a chain of stated links leads to is live (reach.py). One that no chain leads to is suspect when nothing was heard of it for
`suspect_s`, dead after `dead_s`. Its own word (`leaving`) ends it at once. So that nobody can keep up the dead by stating links to them, a
record that was not renewed for `dead_heartbeats` counts as if no chain led to it.
A peer renews its record each heartbeat, and soon when its links change; all relay it. The event loop does so, not the training thread, and
links stand for longer than any stall, so a peer whose training or process stalls for seconds is not taken for dead. A dead peer is dialled
again now and then, so that partitions heal. Pure state: the time and the random source are passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from tscale_net.errors import Refused
from tscale_net.identity import public_key_of
from tscale_net.ports import PeerId, Rng
from tscale_peers import limits
from tscale_peers.allowance import Allowance
from tscale_peers.reach import Reach
from tscale_peers.record_news import FOR_ALL, RecordNews
from tscale_peers.records import Heard, PeerRecord, RecordBook


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
        self._news = RecordNews()
        self._reach = Reach(me)
        self._linked: set[PeerId] = set()
        self.links_changed = 0
        """Counts how often own links came or went."""
        self._live: list[PeerId] = []
        """Sorted."""
        self._there_at: dict[PeerId, float] = {}
        """When a chain of links last led to each peer."""
        self._silent: set[PeerId] = set()
        """Linked, and no record has come over the link yet."""
        self.urgent = False
        """A record was learned that others should hear of at once: of a newcomer, of one that leaves, or with other links than before.
        Cleared by who tells it."""
        self._links_version = 0
        self._node = public_key_of(me)[: limits.node_bytes]
        self._longest_silence_s = limits.dead_s
        self._suspect_s = limits.suspect_s
        self._judge_at = 0.0
        """Nobody's state changes before this time, unless news comes of a peer that is not live."""

    # -- records -----------------------------------------------------------------------------------------------------

    def learn(self, sealed: bytes, now: float, source: PeerId | None = None, wall: float | None = None) -> PeerRecord | None:
        """Take in one record; None if it is not news. Raises Refused for a false one, and "flood" for more than `source` may tell.

        wall: Unix time, by which old news is known (RecordBook.learn)."""
        told_by = self._told_by.get(source) if source is not None else None
        if told_by is not None and not told_by.take(1, now):
            raise Refused("flood", "more peer records than there can be peers")
        known = self.book.author_of(sealed)
        record = self.book.learn(sealed, now, wall) if known is None else None
        if record is not None:
            self._note(record, sealed)
            known = record.peer
        if source is not None:
            if known is not None:
                self._news.has(source, known, sealed)
            elif self.book.outdates(sealed, source):
                # Its clock was set back since its last life, so nobody listens to it: it is told what is known of it, and goes beyond that.
                self._news.tell(source, [source])
        return record

    def _note(self, record: PeerRecord, sealed: bytes) -> None:
        peer = record.peer
        moved = self.book.links_version != self._links_version
        self._links_version = self.book.links_version
        changes = peer != self.me and (record.leaving or self._state.get(peer) is not State.LIVE)
        self._news.learned(peer, FOR_ALL if moved or changes or peer == self.me else sealed[0])
        self.urgent |= moved or changes
        if changes:
            self._judge_at = 0.0
        if peer in self._linked and moved:
            self._share_turns(peer, record)

    def _share_turns(self, peer: PeerId, record: PeerRecord) -> None:
        """Who tells this neighbour what, by the links that it states; a list that is full does not name all."""
        names_all = self._node in record.links and len(record.links) < limits.record_max_links
        self._news.share_turns(peer, record.links.index(self._node) if names_all else 0, len(record.links) if names_all else 0)

    def link_up(self, peer: PeerId) -> None:
        """A new neighbour is told of this peer, and of all others once it speaks: a newcomer that still fetches data would not hear it."""
        self._linked.add(peer)
        self.links_changed += 1
        self._news.link_up(peer, [self.me])
        self._silent.add(peer)
        self._told_by[peer] = Allowance(limits.records_per_s, limits.records_burst)
        self.book.pinned.add(peer)

    def speaks(self, peer: PeerId) -> None:
        """A neighbour has sent records; the first time on its link it is told everything."""
        if peer in self._silent:
            self._silent.discard(peer)
            self._news.tell(peer, [other for other, _ in self.book.items() if other != peer])

    def link_down(self, peer: PeerId) -> None:
        self._linked.discard(peer)
        self.links_changed += 1
        self._news.link_down(peer)
        self._silent.discard(peer)
        self._told_by.pop(peer, None)
        self.book.pinned.discard(peer)

    def news_for(self, neighbour: PeerId) -> list[bytes]:
        """Signed records that this neighbour was not told yet (bounded; the rest comes next time)."""
        return self._news.next_for(neighbour, self.book.newest)

    def has_more_for(self, neighbour: PeerId) -> bool:
        """Was there more than one message may hold?"""
        return self._news.has_more_for(neighbour)

    # -- states ------------------------------------------------------------------------------------------------------

    def heartbeat_s(self) -> float:
        """Seconds between renewals: longer in larger swarms, so that record traffic per peer stays bounded."""
        return max(limits.heartbeat_s, min(len(self.book) ** 2 / limits.heartbeat_pairs_per_s, limits.heartbeat_most_s))

    def state(self, peer: PeerId) -> State:
        return self._state.get(peer, State.DEAD)

    def tick(self, now: float) -> list[Change]:
        """Re-judge everybody, if anybody's state can have changed; returns what changed since the last tick."""
        moved = self._reach.update(self.book, self._linked, self.links_changed)
        if not moved and now < self._judge_at:
            return []
        self._forget_the_forgotten()
        changes = []
        self._judge_at = math.inf
        heartbeat_s = self.heartbeat_s()
        self._longest_silence_s = max(limits.dead_s, limits.dead_heartbeats * heartbeat_s)
        self._suspect_s = min(max(limits.suspect_s, heartbeat_s / limits.suspect_parts), limits.dead_s)
        for peer, heard in self.book.items():
            if peer == self.me:
                continue
            after = self._judge(peer, heard, now)
            before = self._state.get(peer)
            if after is not before:
                self._state[peer] = after
                changes.append(Change(peer, heard.record.name, before, after))
        if changes:
            self._live = sorted(peer for peer, state in self._state.items() if state is State.LIVE)
        return changes

    def _judge(self, peer: PeerId, heard: Heard, now: float) -> State:
        """The state now; `_judge_at` is set to when it may change by itself."""
        if heard.record.leaving:
            return State.LEFT
        if peer in self._reach.peers and now - heard.heard_at < self._longest_silence_s:
            self._there_at[peer] = now
            self._judge_at = min(self._judge_at, heard.heard_at + self._longest_silence_s)
            return State.LIVE
        silent_s = now - max(heard.heard_at, self._there_at.get(peer, heard.heard_at))
        if silent_s >= limits.dead_s:
            return State.DEAD
        is_suspect = silent_s >= self._suspect_s
        self._judge_at = min(self._judge_at, now - silent_s + (limits.dead_s if is_suspect else self._suspect_s))
        return State.SUSPECT if is_suspect else State.LIVE

    def _forget_the_forgotten(self) -> None:
        if len(self._state) >= len(self.book):  # all but this peer itself have a state
            for forgotten in [peer for peer in self._state if peer not in self.book]:
                del self._state[forgotten]
                self._there_at.pop(forgotten, None)
                self._news.forget(forgotten)

    @property
    def live_count(self) -> int:
        """Others that were live at the last tick."""
        return len(self._live)

    def live(self) -> list[PeerRecord]:
        """Records of the others that are live, in a fixed order."""
        return [heard.record for peer in self._live if (heard := self.book.get(peer)) is not None]

    def own_record(self) -> PeerRecord | None:
        """This peer's newest word about itself."""
        heard = self.book.get(self.me)
        return heard.record if heard is not None else None

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
