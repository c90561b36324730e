"""How packets reach everybody: push to a few, have/want, anti-entropy. Pure state; the shell owns sockets, the log and the clock.

Enters: link changes, frames of neighbours, packets accepted here, ticks. Leaves: actions (frames to send, packets to check, chunks to fetch).
- A small publication is pushed at once to `push_fanout` neighbours; the others, and later everybody, hear HAVE and pull with WANT.
- The receiver asks for a packet once, of one neighbour that has it; if nothing comes by a deadline it asks another (epidemic pull).
- Every `anti_entropy_s` two neighbours compare the digests of what they know and, if these differ, the sets; each then pulls what it lacks.
  So any packet that one live peer keeps reaches all, whatever was lost, and order never matters because the replica's sum commutes.
- A packet that no neighbour keeps any more (all said MISSING) can only come as part of a snapshot chunk: action NeedChunks.
Lies are bounded: lists, ranges, and the offers remembered per neighbour have limits, and a peer that offers what it does not deliver is
simply asked less: its offer is forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from tscale_net.ports import Channel, PeerId, Rng
from tscale_peers import limits
from tscale_peers.applied import AppliedSet
from tscale_peers.messages import HAVE, MISSING, PACKET, SUMMARY, WANT, Ranges, Summary, decode_ranges, decode_summary

Key = tuple[bytes, int, int]
"""(stream key, seq, chunk) of one packet."""


class PacketStore(Protocol):
    """The delta log, as far as gossip needs it."""

    def get(self, key: Key) -> bytes | None: ...


@dataclass(frozen=True, slots=True)
class Send:
    peer: PeerId
    kind: int
    body: bytes
    channel: Channel = Channel.CONTROL


@dataclass(frozen=True, slots=True)
class NeedChunks:
    """These chunks miss packets that no neighbour keeps: fetch them as snapshot chunks from one of `sources`."""

    chunks: tuple[int, ...]
    sources: tuple[PeerId, ...]


Action = Send | NeedChunks


@dataclass(slots=True)
class Neighbour:
    """What is going on with one linked peer."""

    announced: OrderedDict[Key, None] = field(default_factory=OrderedDict)
    """Keys it has or was sent (bounded, oldest forgotten): it need not be told again."""
    confirmed: OrderedDict[Key, None] = field(default_factory=OrderedDict)
    """Keys that it said it has (bounded): a receipt, while what was only sent may be lost with the link."""
    to_tell: list[Key] = field(default_factory=list)
    to_send: OrderedDict[Key, None] = field(default_factory=OrderedDict)
    """Keys it asked for."""
    asked: int = 0
    """Packets asked of it and not yet here."""

    def has(self, key: Key) -> None:
        _remember(self.announced, key)

    def says_it_has(self, key: Key) -> None:
        _remember(self.announced, key)
        _remember(self.confirmed, key)


def _remember(keys: OrderedDict[Key, None], key: Key) -> None:
    keys[key] = None
    if len(keys) > limits.neighbour_keys:
        keys.popitem(last=False)


@dataclass(slots=True)
class Wanted:
    """A packet that is lacking: who offers it, and of whom it was asked until when."""

    offers: list[PeerId] = field(default_factory=list)
    asked_of: PeerId | None = None
    deadline: float = 0.0
    refused_by: set[PeerId] = field(default_factory=set)


class Gossip:
    """The gossip state of one peer. `known` holds every packet checked here (applied or waiting) and everything a snapshot contained."""

    def __init__(self, known: AppliedSet, chunks: int, store: PacketStore, rng: Rng) -> None:
        self.known = known
        self.hold = False
        """While a snapshot is being fetched nothing is pulled: its contents are not known yet."""
        self.compared = False
        """Some neighbour's set was compared with ours: what it knows is either here or on its way."""
        self._chunks = chunks
        self._store = store
        self._rng = rng
        self._neighbours: dict[PeerId, Neighbour] = {}
        self._wanted: OrderedDict[Key, Wanted] = OrderedDict()
        self._compare_at = 0.0
        self._ask_summary: list[PeerId] = []

    # -- links -------------------------------------------------------------------------------------------------------

    def link_up(self, peer: PeerId) -> None:
        self._neighbours[peer] = Neighbour()
        self._ask_summary.append(peer)

    def link_down(self, peer: PeerId) -> None:
        self._neighbours.pop(peer, None)
        for wanted in self._wanted.values():
            if peer in wanted.offers:
                wanted.offers.remove(peer)
            if wanted.asked_of == peer:
                wanted.asked_of = None

    # -- packets accepted here ---------------------------------------------------------------------------------------

    def accepted(self, keys: Iterable[Key], source: PeerId | None) -> None:
        """These packets were checked and logged here: tell the neighbours. The source is told too, which is the author's receipt."""
        for key in keys:
            self._arrived(key)
            for peer, neighbour in self._neighbours.items():
                if peer == source:
                    neighbour.has(key)
                    neighbour.to_tell.append(key)
                elif key not in neighbour.announced:
                    neighbour.to_tell.append(key)

    def heard_again(self, key: Key, source: PeerId) -> None:
        """A neighbour sent what is known here already."""
        self._arrived(key)
        if source in self._neighbours:
            self._neighbours[source].has(key)

    def push(self, packets: list[tuple[Key, bytes]]) -> list[Action]:
        """Own new packets: to a few neighbours at once if small, else announced like any other."""
        if sum(len(body) for _, body in packets) > limits.push_max_bytes:
            return []
        chosen = self._rng.sample(sorted(self._neighbours), min(limits.push_fanout, len(self._neighbours)))
        for peer in chosen:
            for key, _ in packets:
                self._neighbours[peer].has(key)
        return [Send(peer, PACKET, body, Channel.BULK) for peer in chosen for _, body in packets]

    def refused(self, key: Key, source: PeerId) -> None:
        """What came for this key was no good: do not ask that peer for it again."""
        wanted = self._wanted.get(key)
        if wanted is not None:
            self._unask(wanted)
            wanted.refused_by.add(source)
            if source in wanted.offers:
                wanted.offers.remove(source)

    def _arrived(self, key: Key) -> None:
        wanted = self._wanted.pop(key, None)
        if wanted is not None:
            self._unask(wanted)

    def _unask(self, wanted: Wanted) -> None:
        neighbour = self._neighbours.get(wanted.asked_of) if wanted.asked_of else None
        if neighbour is not None:
            neighbour.asked = max(0, neighbour.asked - 1)
        wanted.asked_of = None

    # -- frames of neighbours ----------------------------------------------------------------------------------------

    def on_frame(self, peer: PeerId, kind: int, body: bytes, now: float) -> list[Action]:
        """HAVE, WANT, MISSING or SUMMARY of a linked peer. Raises Refused for a malformed one."""
        neighbour = self._neighbours.get(peer)
        if neighbour is None:
            return []
        if kind == SUMMARY:
            return self._on_summary(peer, neighbour, decode_summary(body), now)
        keys = decode_ranges(body, self._chunks)
        if kind == HAVE:
            for key in keys:
                neighbour.says_it_has(key)
                self._offer(key, peer)
        elif kind == WANT:
            for key in keys:
                if len(neighbour.to_send) < limits.neighbour_keys:
                    neighbour.to_send[key] = None
        elif kind == MISSING:
            for key in keys:
                self.refused(key, peer)
        return []

    def _offer(self, key: Key, peer: PeerId) -> None:
        if self.known.contains(*key):
            return
        wanted = self._wanted.get(key)
        if wanted is None:
            if len(self._wanted) >= limits.wanted_keys:
                return
            wanted = self._wanted[key] = Wanted()
        if peer not in wanted.offers:
            wanted.offers.append(peer)
            wanted.refused_by.discard(peer)

    def _on_summary(self, peer: PeerId, neighbour: Neighbour, summary: Summary, now: float) -> list[Action]:
        if summary.digest == self.known.digest():
            self.compared = True
            return []
        if not summary.applied:
            return [Send(peer, SUMMARY, self._summary(full=True), Channel.BULK)]
        self.compared = True
        theirs = AppliedSet.decode(summary.applied, self._chunks, limits.streams_max)
        for key in _keys(self.known.missing_from(theirs), limits.anti_entropy_keys):
            self._offer(key, peer)
        for key in _keys(theirs.missing_from(self.known), limits.anti_entropy_keys):
            if self._store.get(key) is not None:
                neighbour.to_tell.append(key)
        return [] if summary.reply else [Send(peer, SUMMARY, self._summary(full=True, reply=True), Channel.BULK)]

    def _summary(self, full: bool, reply: bool = False) -> bytes:
        return msgspec.msgpack.encode(Summary(self.known.digest(), self.known.encode() if full else b"", reply))

    # -- time --------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """A few times a second: announcements (gathered, so that many packets share one message) and a comparison that is due."""
        actions: list[Action] = [Send(peer, SUMMARY, self._summary(full=False)) for peer in self._due_comparisons(now)]
        for peer, neighbour in self._neighbours.items():
            actions += self._announcements(peer, neighbour)
        return actions

    def flush(self, now: float, pending_bytes: Callable[[PeerId], int]) -> list[Action]:
        """After events: requests, and packets that were asked for."""
        actions = self._requests(now)
        for peer, neighbour in self._neighbours.items():
            if neighbour.to_send:
                actions += self._deliveries(peer, neighbour, pending_bytes(peer))
        return actions

    def _due_comparisons(self, now: float) -> list[PeerId]:
        due = [peer for peer in self._ask_summary if peer in self._neighbours]
        self._ask_summary.clear()
        if now >= self._compare_at:
            self._compare_at = now + limits.anti_entropy_s * (0.5 + self._rng.random())
            if self._neighbours:
                due.append(self._rng.choice(sorted(self._neighbours)))
        return due

    def _announcements(self, peer: PeerId, neighbour: Neighbour) -> list[Action]:
        if not neighbour.to_tell:
            return []
        told, neighbour.to_tell = neighbour.to_tell[: limits.ranges_per_message], neighbour.to_tell[limits.ranges_per_message :]
        return [Send(peer, HAVE, Ranges.of(told).encode())]

    def _requests(self, now: float) -> list[Action]:
        if self.hold:
            return []
        ask: dict[PeerId, list[Key]] = {}
        for key, wanted in list(self._wanted.items()):
            if wanted.asked_of is not None:
                if now < wanted.deadline:
                    continue
                slow = wanted.asked_of
                self._unask(wanted)
                if slow in wanted.offers:  # to the back: ask the others first
                    wanted.offers.remove(slow)
            peer = next((p for p in wanted.offers if self._can_ask(p)), None)
            if peer is None:
                if not wanted.offers and not wanted.refused_by:
                    del self._wanted[key]  # offered again if anybody has it
                continue
            wanted.asked_of, wanted.deadline = peer, now + limits.want_timeout_s
            self._neighbours[peer].asked += 1
            ask.setdefault(peer, []).append(key)
        return [
            Send(peer, WANT, Ranges.of(keys[i : i + limits.ranges_per_message]).encode())
            for peer, keys in ask.items()
            for i in range(0, len(keys), limits.ranges_per_message)
        ]

    def _can_ask(self, peer: PeerId) -> bool:
        neighbour = self._neighbours.get(peer)
        return neighbour is not None and neighbour.asked < limits.packets_in_flight

    def _deliveries(self, peer: PeerId, neighbour: Neighbour, pending: int) -> list[Action]:
        actions: list[Action] = []
        gone: list[Key] = []
        while neighbour.to_send and pending < limits.bulk_pending_bytes:
            key, _ = neighbour.to_send.popitem(last=False)
            body = self._store.get(key)
            if body is None:
                gone.append(key)
                continue
            pending += len(body)
            neighbour.has(key)
            actions.append(Send(peer, PACKET, body, Channel.BULK))
        if gone:
            actions.append(Send(peer, MISSING, Ranges.of(gone).encode()))
        return actions

    def unobtainable(self) -> NeedChunks | None:
        """Chunks with packets that every neighbour which had them has thrown away; forgets them (ask again if the fetch fails)."""
        keys = [k for k, w in self._wanted.items() if not w.offers and w.refused_by and w.asked_of is None]
        if not keys:
            return None
        sources = {peer for key in keys for peer in self._wanted[key].refused_by if peer in self._neighbours}
        for key in keys:
            del self._wanted[key]
        return NeedChunks(tuple(sorted({chunk for _, _, chunk in keys})), tuple(sorted(sources)))

    # -- for people --------------------------------------------------------------------------------------------------

    def holders(self, key: Key) -> int:
        """How many neighbours have said that they hold this packet."""
        return sum(key in n.confirmed for n in self._neighbours.values())

    def backlog(self) -> int:
        """Packets known to exist that are not here yet."""
        return len(self._wanted)


def _keys(ranges: Iterable[tuple[bytes, int, int, int]], most: int) -> Iterable[Key]:
    """Expand (stream, chunk, first seq, last seq) to single keys, at most `most`."""
    left = most
    for stream, chunk, first, last in ranges:
        for seq in range(first, last + 1):
            if left == 0:
                return
            left -= 1
            yield (stream, seq, chunk)

