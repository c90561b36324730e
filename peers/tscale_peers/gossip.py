"""How packets reach everybody: push to a few, have/want, anti-entropy. Pure state; the shell owns sockets, the log and the clock.

Enters: link changes, frames of neighbours, packets accepted here, ticks. Leaves: actions (frames to send, chunks to fetch).
- A small publication is pushed at once to `push_fanout` neighbours; the others, and later everybody, hear HAVE and pull with WANT.
- The receiver asks for a packet of one neighbour that has it at a time; if nothing comes by a deadline it asks another (epidemic pull).
- Every `anti_entropy_s` two neighbours compare the digests of what they know and, if these differ, the sets; each then pulls what it lacks.
  So any packet that one live peer keeps reaches all, whatever was lost, and order never matters because the replica's sum commutes.
- A packet that no neighbour keeps any more (all said MISSING) can only come as part of a snapshot chunk: action NeedChunks. So do packets
  that are more bytes than their chunk (catch_up.py).
Lies are bounded: what one neighbour may name, offer, ask for, and have compared per second has limits of its own (neighbour.py, wants.py),
and a peer that offers what it does not deliver is asked less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import msgspec

from tscale_net.errors import Refused
from tscale_net.ports import Channel, PeerId, Rng
from tscale_peers import limits
from tscale_peers.applied import AppliedSet
from tscale_peers.catch_up import CatchUp, Verdict
from tscale_peers.messages import (
    HAVE,
    MISSING,
    PACKET,
    SET_PART,
    SUMMARY,
    WANT,
    Ranges,
    Summary,
    decode_ranges,
    decode_set_part,
    decode_summary,
)
from tscale_peers.neighbour import Neighbour
from tscale_peers.packet import Key
from tscale_peers.records import author_of
from tscale_peers.set_parts import between, part_from
from tscale_peers.wants import WantList


class PacketStore(Protocol):
    """The delta log, as far as gossip needs it."""

    def get(self, key: Key) -> bytes | None: ...

    def holds(self, key: Key) -> bool: ...


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
    for_its_price: bool = False
    """The packets are kept, but they are more bytes than the chunks."""


Action = Send | NeedChunks


class Gossip:
    """The gossip state of one peer. `known` holds every packet checked here (applied or waiting) and everything a snapshot contained."""

    def __init__(self, known: AppliedSet, chunks: int, store: PacketStore, rng: Rng, catch_up: CatchUp | None = None) -> None:
        """`catch_up` None: everything that somebody keeps comes packet by packet."""
        self.known = known
        self.catch_up = catch_up
        self.hold = False
        """While a snapshot is being fetched nothing is pulled or compared: its contents are not known yet. `resume` ends it."""
        self.compared = False
        """Some neighbour's set was compared with ours: what it knows is either here or on its way."""
        self.pull_after = 0.0
        """Nothing is asked for before this time (the log cannot be written)."""
        self.may_ask: Callable[[], bool] = lambda: True
        """Asked once for every packet before it is asked for: a limit of what this peer downloads."""
        self.has_news = False
        """Something waits to be announced or compared; `tick` clears it."""
        self.unheld: dict[Key, None] = {}
        """Own packets that no neighbour is known to hold yet (bounded)."""
        self._chunks = chunks
        self._store = store
        self._rng = rng
        self._neighbours: dict[PeerId, Neighbour] = {}
        self._wants = WantList()
        self._compare_at = 0.0
        self._ask_summary: dict[PeerId, None] = {}
        self._more_at: dict[PeerId, None] = {}
        """Neighbours whose sets lacked more than one comparison takes up."""

    # -- links and start ---------------------------------------------------------------------------------------------

    def link_up(self, peer: PeerId) -> None:
        self._neighbours[peer] = Neighbour()
        self._wants.link_up(peer)
        self._ask_summary[peer] = None
        self.has_news = True

    def link_down(self, peer: PeerId) -> None:
        self._neighbours.pop(peer, None)
        self._wants.link_down(peer)
        self._ask_summary.pop(peer, None)
        self._more_at.pop(peer, None)

    def resume(self) -> None:
        """The snapshot is here: compare with everybody, and pull."""
        self.hold = False
        self._ask_summary = dict.fromkeys(self._neighbours)
        self.has_news = True

    def now_known(self, known: AppliedSet) -> None:
        """Snapshot chunks were loaded: this is what is known now."""
        self.known = known
        self._wants.forget(lambda key: known.contains(*key))

    # -- packets accepted here ---------------------------------------------------------------------------------------

    def accepted(self, keys: Iterable[Key], source: PeerId | None) -> None:
        """These packets were checked and logged here: tell the neighbours. The source is told too, which is the author's receipt."""
        self.has_news = True
        for key in keys:
            self._wants.arrived(key, source)
            for peer, neighbour in self._neighbours.items():
                if peer == source:
                    neighbour.has(key)
                    neighbour.tell(key)
                elif key not in neighbour.announced:
                    neighbour.tell(key)

    def published(self, packets: list[tuple[Key, bytes]]) -> list[Action]:
        """Own new packets: to a few neighbours at once if that is small, announced to the others. Watched until a neighbour holds them."""
        keys = [key for key, _ in packets]
        for key in keys[: limits.unheld_keys - len(self.unheld)]:
            self.unheld[key] = None
        actions: list[Action] = []
        if sum(len(body) for _, body in packets) <= limits.push_max_bytes and len(packets) <= limits.packets_in_flight:
            for peer in self._rng.sample(sorted(self._neighbours), min(limits.push_fanout, len(self._neighbours))):
                actions += self._push(peer, self._neighbours[peer], packets)
        self.accepted(keys, None)
        return actions

    def _push(self, peer: PeerId, neighbour: Neighbour, packets: list[tuple[Key, bytes]]) -> list[Action]:
        """Unless it still has so many to check that more would look like a flood."""
        if len(neighbour.pushed) + len(packets) > limits.packets_in_flight:
            return []
        for key, _ in packets:
            neighbour.has(key)
            neighbour.pushed.add(key)
        return [Send(peer, PACKET, body, Channel.BULK) for _, body in packets]

    def heard_again(self, key: Key, source: PeerId) -> None:
        """A neighbour sent what is known here already."""
        self._wants.arrived(key, source)
        self._holds(key, source)

    def no_good(self, key: Key, source: PeerId, blame: bool = True) -> None:
        """What came for this key was refused: do not ask that peer for it again."""
        self._wants.no_good(key, source, blame)

    def has_listeners(self) -> bool:
        """Does any neighbour take part in gossip? A newcomer does not until it has its snapshot."""
        return any(neighbour.takes_part for neighbour in self._neighbours.values())

    def _holds(self, key: Key, peer: PeerId) -> None:
        """A neighbour has shown or said that it holds this packet."""
        self.unheld.pop(key, None)
        neighbour = self._neighbours.get(peer)
        if neighbour is not None:
            neighbour.has(key)
            neighbour.pushed.discard(key)
            neighbour.to_send.pop(key, None)

    # -- frames of neighbours ----------------------------------------------------------------------------------------

    def on_frame(self, peer: PeerId, kind: int, body: bytes, now: float) -> list[Action]:
        """HAVE, WANT, MISSING, SUMMARY or SET_PART of a linked peer. Raises Refused for a malformed one, or for too many ("flood")."""
        neighbour = self._neighbours.get(peer)
        if neighbour is None:
            return []
        neighbour.takes_part = True
        if kind == SUMMARY:
            summary = decode_summary(body)
            if summary.digest == self.known.digest():
                neighbour.pushed.clear()
                return self._equal()
            if not summary.applied:
                return self._tell_set(peer, neighbour, now)
            return self._compare(peer, neighbour, (b"", b"", summary.applied, summary.reply), now)
        if kind == SET_PART:
            part = decode_set_part(body)
            return self._compare(peer, neighbour, (part.first, part.end, part.applied, part.reply), now)
        self._on_keys(peer, neighbour, kind, decode_ranges(body, self._chunks), now)
        return []

    def _on_keys(self, peer: PeerId, neighbour: Neighbour, kind: int, keys: list[Key], now: float) -> None:
        if not neighbour.keys.take(len(keys), now):
            raise Refused("flood", "more packets are named than there can be")
        for key in keys:
            if kind == HAVE:
                self._holds(key, peer)
                if self._welcomes(key[0]) and not self.known.contains(*key):
                    self._wants.offer(key, peer)
            elif kind == WANT:
                neighbour.ask(key)
            else:
                self._wants.denies(key, peer)

    def _welcomes(self, stream_key: bytes) -> bool:
        """Is there room for this stream? What would be refused is not fetched."""
        return stream_key in self.known.streams or len(self.known) < self.known.max_streams

    # -- comparing ---------------------------------------------------------------------------------------------------

    def _equal(self) -> list[Action]:
        self.compared = True
        self.unheld.clear()
        return []

    def _compare(self, peer: PeerId, neighbour: Neighbour, told: tuple[bytes, bytes, bytes, bool], now: float) -> list[Action]:
        """Take up what a neighbour's set, or a part of it, has and lacks; answer with ours unless it was an answer."""
        first, end, encoded, reply = told
        if self.hold:
            return []
        if not neighbour.sets_heard.take(1, now):
            raise Refused("flood", "sets of packets are told more often than they can change")
        theirs = between(AppliedSet.decode(encoded, self._chunks, self.known.max_streams), first, end)
        ours = between(self.known, first, end)
        verdict = self._weigh(peer, ours, theirs, now)
        welcome = (part for part in ours.missing_from(theirs) if part[1] not in verdict.leave and self._welcomes(part[0]))
        lacking = list(_keys(welcome, limits.anti_entropy_keys))
        taken = [self._wants.offer(key, peer) for key in lacking]
        for key in _keys(theirs.missing_from(ours), limits.anti_entropy_keys):
            if self._store.holds(key):
                neighbour.tell(key)
                self.has_news = True
        for key in [key for key in [*self.unheld, *neighbour.pushed] if theirs.contains(*key)]:
            self._holds(key, peer)
        if len(lacking) == limits.anti_entropy_keys or not all(taken):
            self._more_at[peer] = None
        elif not verdict.leave:
            self.compared = True
        fetch: list[Action] = [NeedChunks(verdict.fetch, verdict.sources, for_its_price=True)] if verdict.fetch else []
        return fetch if reply else fetch + self._tell_set(peer, neighbour, now, reply=True)

    def _weigh(self, peer: PeerId, ours: AppliedSet, theirs: AppliedSet, now: float) -> Verdict:
        """Which chunks are cheaper as snapshots."""
        if self.catch_up is None:
            return Verdict()
        missing: Counter[int] = Counter()
        for _, chunk, first, last in islice(ours.missing_from(theirs), limits.anti_entropy_keys):
            missing[chunk] += last - first + 1
        if not missing:
            return Verdict()
        is_author = any(author_of(stream) == peer for stream in self.known.streams)

        def recoverable(index: int) -> bool:
            only_here = (part for part in theirs.missing_from(ours) if part[1] == index)
            keys = list(_keys(only_here, limits.anti_entropy_keys))
            return len(keys) < limits.anti_entropy_keys and all(map(self._store.holds, keys))

        return self.catch_up.weigh(peer, missing, is_author, len(self._neighbours), recoverable, now)

    def _tell_set(self, peer: PeerId, neighbour: Neighbour, now: float, reply: bool = False) -> list[Action]:
        """Our set, or the next part of it if it is too large for one message."""
        if self.hold or not neighbour.sets_told.take(1, now):
            return []
        part = part_from(self.known, neighbour.set_from, limits.set_bytes_max)
        neighbour.set_from = part.end
        if not part.first and not part.end:
            return [Send(peer, SUMMARY, _encode(Summary(self.known.digest(), part.applied, reply)), Channel.BULK)]
        return [Send(peer, SET_PART, _encode(msgspec.structs.replace(part, reply=reply)), Channel.BULK)]

    def _due_comparisons(self, now: float) -> list[PeerId]:
        if self.hold:
            return []
        due, self._ask_summary = self._ask_summary, {}
        if self._more_at and len(self._wants) < limits.anti_entropy_keys // 2:
            due |= self._more_at
            self._more_at = {}
        if now >= self._compare_at:
            mean_s = limits.anti_entropy_s * (2 if len(self._neighbours) >= limits.links_target else 1)
            self._compare_at = now + mean_s * (0.5 + self._rng.random())
            if self._neighbours:
                due[self._rng.choice(sorted(self._neighbours))] = None
        return list(due)

    # -- time --------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """When there is news, and now and then: announcements (gathered, so that many packets share one message) and a comparison that is
        due."""
        self.has_news = False
        actions: list[Action] = []
        due = self._due_comparisons(now)
        if due:
            digest_only = _encode(Summary(self.known.digest(), b""))
            actions += [Send(peer, SUMMARY, digest_only) for peer in due]
        for peer, neighbour in self._neighbours.items():
            if neighbour.to_tell:
                actions += [Send(peer, HAVE, body) for body in Ranges.bodies(neighbour.next_told())]
                self.has_news |= bool(neighbour.to_tell)
        return actions

    def flush(self, now: float, pending_bytes: Callable[[PeerId], int]) -> list[Action]:
        """After events: requests, and packets that were asked for."""
        actions = self._requests(now)
        for peer, neighbour in self._neighbours.items():
            if neighbour.to_send:
                actions += self._deliveries(peer, neighbour, pending_bytes(peer))
        return actions

    def _requests(self, now: float) -> list[Action]:
        if self.hold or now < self.pull_after:
            return []
        return [Send(peer, WANT, body) for peer, keys in self._wants.asks(now, self.may_ask).items() for body in Ranges.bodies(keys)]

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
        return actions + [Send(peer, MISSING, body) for body in Ranges.bodies(gone)]

    def unobtainable(self) -> NeedChunks | None:
        """Chunks with packets that every neighbour which had them has thrown away; those are forgotten, and offered again if need be.

        A stranger alone is not believed: it could speak of packets that never were, and give a forged chunk. Who says so must have work of
        its own in what is known here, or others must say the same. Donors are authors where there are any.
        """
        if not self._wants.any_denied:
            return None
        authors = {author_of(stream) for stream in self.known.streams}
        keys, peers = self._wants.unobtainable(lambda denied: len(denied) >= limits.snapshot_witnesses or bool(denied & authors))
        if not keys:
            return None
        return NeedChunks(tuple(sorted({chunk for _, _, chunk in keys})), tuple(sorted(peers & authors or peers)))

    def give_up(self, chunks: Iterable[int]) -> None:
        """These are not being fetched as snapshots, or not any more: their packets may be asked for."""
        if self.catch_up is not None:
            self.catch_up.fetching.difference_update(chunks)

    # -- for people --------------------------------------------------------------------------------------------------

    def backlog(self) -> int:
        """Packets that neighbours offer and that are not here yet."""
        return self._wants.obtainable


def _encode(message: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(message)


def _keys(ranges: Iterable[tuple[bytes, int, int, int]], most: int) -> Iterable[Key]:
    """Expand (stream, chunk, first seq, last seq) to single keys, at most `most`."""
    left = most
    for stream, chunk, first, last in ranges:
        for seq in range(first, last + 1):
            if left == 0:
                return
            left -= 1
            yield (stream, seq, chunk)
