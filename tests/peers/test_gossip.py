"""Gossip as pure state, no loop: push, have and want, missing, comparing sets, bounds against liars, holding back during a snapshot."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tscale_net.errors import Refused
from tscale_net.identity import Identity
from tscale_net.limits import BULK_BODY_BYTES, CONTROL_BODY_BYTES
from tscale_net.ports import Channel
from tscale_peers import limits
from tscale_peers.applied import AppliedSet
from tscale_peers.delta_log import MemoryLog
from tscale_peers.gossip import Action, Gossip, NeedChunks, Send
from tscale_peers.messages import HAVE, MISSING, PACKET, SET_PART, SUMMARY, WANT, Range, Ranges, SetPart, Summary, decode_ranges
from tscale_peers.packet import Key
from tscale_peers.set_parts import between, part_from

CHUNKS = 8


def stream(n: int) -> bytes:
    return n.to_bytes(40, "big")


def key(n: int, seq: int = 1, chunk: int = 0) -> Key:
    return (stream(n), seq, chunk)


def body_of(k: Key) -> bytes:
    return repr(k).encode()


class Node:
    """One gossip state with its log, and what shell and intake do around it."""

    def __init__(self, *neighbours: str, seed: int = 1, chunks: int = CHUNKS) -> None:
        self.log = MemoryLog(1 << 20)
        self.out: list[Send] = []
        self.gossip = Gossip(AppliedSet(chunks), chunks, self.log, random.Random(seed))
        for neighbour in neighbours:
            self.gossip.link_up(neighbour)

    def add(self, *keys: Key, source: str | None = None) -> None:
        for k in keys:
            self.log.append(body_of(k), k)
            self.gossip.known.add(*k)
        self.gossip.accepted(keys, source)

    def publish(self, *keys: Key, size: int = 0) -> list[Action]:
        packets = [(k, body_of(k) + bytes(size)) for k in keys]
        for k, body in packets:
            self.log.append(body, k)
            self.gossip.known.add(*k)
        return self.gossip.published(packets)

    def hears(self, peer: str, kind: int, keys: list[Key], now: float = 0.0) -> None:
        assert self.gossip.on_frame(peer, kind, Ranges.of(keys).encode(), now) == []

    def told(self, peer: str, kind: int, now: float = 0.0) -> set[Key]:
        """Keys of all messages of a kind to a neighbour since this was asked last, up to a tick and a flush now."""
        return {k for body in self.bodies(peer, kind, now) for k in decode_ranges(body, CHUNKS)}

    def bodies(self, peer: str, kind: int, now: float = 0.0) -> list[bytes]:
        self.out += [a for a in self.gossip.tick(now) + self.gossip.flush(now, lambda p: 0) if isinstance(a, Send)]
        found = [a for a in self.out if (a.peer, a.kind) == (peer, kind)]
        self.out = [a for a in self.out if a not in found]
        return [a.body for a in found]


def packets(actions: list[Action]) -> list[tuple[str, bytes]]:
    return [(a.peer, a.body) for a in actions if isinstance(a, Send) and a.kind == PACKET]


def kinds(actions: list[Action]) -> list[int]:
    return [a.kind for a in actions if isinstance(a, Send)]


def encoded(message: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(message)


# -- push, have, want, missing -----------------------------------------------------------------------------------------


def test_a_small_publication_is_pushed_to_a_few_and_announced_to_the_others() -> None:
    names = [f"n{i}" for i in range(6)]
    node = Node(*names)
    pushed = {peer for peer, _ in packets(node.publish(key(1), key(1, chunk=1)))}
    assert len(pushed) == limits.push_fanout
    for name in names:
        assert node.told(name, HAVE) == (set() if name in pushed else {key(1), key(1, chunk=1)})


def test_a_large_publication_or_one_of_many_packets_is_only_announced() -> None:
    node = Node("a")
    assert node.publish(key(1), size=limits.push_max_bytes + 1) == []
    assert node.publish(*[key(1, 2 + n) for n in range(limits.packets_in_flight + 1)]) == [], "more would be a flood over there"
    assert len(node.told("a", HAVE)) == limits.packets_in_flight + 2


def test_have_want_packet() -> None:
    giver, taker = Node("taker"), Node("giver")
    giver.add(key(1), key(2))
    taker.hears("giver", HAVE, sorted(giver.told("taker", HAVE)))
    giver.hears("taker", WANT, sorted(taker.told("giver", WANT)))
    sent = packets(giver.gossip.flush(0.0, lambda peer: 0))
    assert sorted(body for _, body in sent) == sorted([body_of(key(1)), body_of(key(2))])
    assert taker.told("giver", WANT, 1.0) == set(), "asked once"
    taker.add(key(1), key(2), source="giver")
    assert taker.told("giver", HAVE, 1.0) == {key(1), key(2)}, "the giver hears of it: a receipt"
    assert taker.gossip.backlog() == 0


def test_a_receipt_or_an_equal_set_or_a_set_that_has_it_means_that_it_is_held() -> None:
    for how in ("have", "equal", "set", "sent back"):
        node = Node("a")
        node.publish(key(1))
        assert len(node.gossip.unheld) == 1
        if how == "have":
            node.hears("a", HAVE, [key(1)])
        elif how == "equal":
            node.gossip.on_frame("a", SUMMARY, encoded(Summary(node.gossip.known.digest(), b"")), 0.0)
        elif how == "set":
            theirs = AppliedSet(CHUNKS)
            for k in (key(1), key(2)):
                theirs.add(*k)
            node.gossip.on_frame("a", SUMMARY, encoded(Summary(theirs.digest(), theirs.encode())), 0.0)
        else:
            node.gossip.heard_again(key(1), "a")
        assert not node.gossip.unheld, how


def test_who_has_it_by_now_is_not_sent_it() -> None:
    node = Node("a")
    node.add(key(1), key(2))
    node.hears("a", WANT, [key(1), key(2)])
    node.hears("a", HAVE, [key(1)])
    assert packets(node.gossip.flush(0.0, lambda peer: 0)) == [("a", body_of(key(2)))]


def test_what_is_gone_is_said_to_be_missing_and_then_asked_of_another() -> None:
    node = Node("a", "b")
    node.hears("a", WANT, [key(9)])
    assert node.told("a", MISSING) == {key(9)}
    node.hears("a", HAVE, [key(1)])
    assert node.told("a", WANT) == {key(1)}
    node.hears("b", HAVE, [key(1)])
    node.hears("a", MISSING, [key(1)])
    assert node.gossip.unobtainable() is None
    assert node.told("b", WANT) == {key(1)}
    node.hears("b", MISSING, [key(1)])
    assert node.gossip.unobtainable() == NeedChunks((0,), ("a", "b"))
    assert node.gossip.unobtainable() is None


def test_one_stranger_is_not_believed_that_a_packet_is_gone_but_an_author_is() -> None:
    """Else it could speak of a packet that never was, and give a forged chunk."""
    who = Identity.from_seed(b"w" * 32)
    node = Node(who.peer_id)
    node.hears(who.peer_id, HAVE, [key(1)])
    assert node.told(who.peer_id, WANT) == {key(1)}
    node.hears(who.peer_id, MISSING, [key(1)])
    assert node.gossip.unobtainable() is None and node.gossip.backlog() == 0, "nothing to wait for either"
    node.add((who.public_key + bytes(8), 1, 0))
    assert node.gossip.unobtainable() == NeedChunks((0,), (who.peer_id,))


def test_bad_content_never_leads_to_a_snapshot() -> None:
    """Else a liar could offer an invented packet, answer with noise, and be asked for the whole chunk."""
    node = Node("liar")
    node.hears("liar", HAVE, [key(1)])
    assert node.told("liar", WANT) == {key(1)}
    node.gossip.no_good(key(1), "liar")
    node.hears("liar", MISSING, [key(1)])
    assert node.gossip.unobtainable() is None


def test_packets_wait_in_the_log_while_the_uplink_is_busy() -> None:
    node = Node("slow", "fast")
    node.add(key(1))
    for peer in ("slow", "fast"):
        node.hears(peer, WANT, [key(1)])
    busy = {"slow": limits.bulk_pending_bytes, "fast": 0}
    assert packets(node.gossip.flush(0.0, busy.__getitem__)) == [("fast", body_of(key(1)))]
    assert packets(node.gossip.flush(0.0, lambda peer: 0)) == [("slow", body_of(key(1)))]


def test_nothing_is_asked_for_while_the_log_cannot_be_written() -> None:
    node = Node("a")
    node.hears("a", HAVE, [key(1)])
    node.gossip.pull_after = 10.0
    assert node.told("a", WANT, 9.9) == set()
    assert node.told("a", WANT, 10.0) == {key(1)}


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_no_message_is_too_large_for_its_channel_whatever_is_asked() -> None:
    """A neighbour that asks for scattered packets which are not here must not provoke an answer that cannot be sent."""
    node = Node("liar")
    scattered = [key(n, seq, chunk) for n in range(1, 40) for seq in (1, 3, 5) for chunk in range(0, CHUNKS, 2)]
    node.hears("liar", WANT, scattered)
    missing = node.gossip.flush(0.0, lambda peer: 0)
    node.gossip.accepted(scattered, None)
    have = node.gossip.tick(0.0)
    assert MISSING in kinds(missing) and kinds(have).count(HAVE) > 1
    assert all(len(a.body) <= CONTROL_BODY_BYTES for a in missing + have if isinstance(a, Send) and a.channel is Channel.CONTROL)


def test_wants_beyond_what_an_honest_peer_asks_are_taken_no_notice_of() -> None:
    node = Node("greedy")
    many = [key(1, seq) for seq in range(1, 4 * limits.asked_keys)]
    node.add(*many)
    node.hears("greedy", WANT, many)
    assert len(packets(node.gossip.flush(0.0, lambda peer: 0))) == limits.asked_keys


def test_a_flood_of_keys_is_refused_and_an_honest_neighbour_still_heard() -> None:
    chunks = limits.keys_per_message
    node = Node("liar", "honest", chunks=chunks)
    with pytest.raises(Refused) as refusal:
        for seq in range(1, 1000):
            node.gossip.on_frame("liar", HAVE, Ranges([Range(stream(1), seq, 0, chunks - 1)]).encode(), 0.0)
    assert refusal.value.code == "flood"
    assert node.gossip.backlog() == limits.wanted_per_neighbour
    node.gossip.on_frame("honest", HAVE, Ranges([Range(stream(2), 1, 0, 0)]).encode(), 0.0)
    asked = [a for a in node.gossip.flush(0.0, lambda peer: 0) if isinstance(a, Send) and a.peer == "honest"]
    assert [decode_ranges(a.body, chunks) for a in asked] == [[key(2)]]


def test_announcements_of_a_large_model_keep_up() -> None:
    """1500 chunks are a handful of ranges: one message, one tick."""
    node = Node("a", chunks=1500)
    node.add(*[key(1, 1, chunk) for chunk in range(1500)])
    have = [a for a in node.gossip.tick(0.0) if isinstance(a, Send) and a.kind == HAVE]
    assert len(have) == 1 and len(have[0].body) < 200


def test_what_is_to_be_told_is_bounded() -> None:
    node = Node("a")
    for seq in range(1, limits.neighbour_keys + 500):
        node.gossip.accepted([key(1, seq)], None)
    told = sum(len(node.told("a", HAVE, now)) for now in range(20))
    assert told == limits.neighbour_keys


def test_streams_that_would_be_refused_are_not_fetched() -> None:
    node = Node("a")
    node.gossip.known.max_streams = 1
    node.add(key(1))
    node.hears("a", HAVE, [key(1, 2), key(2)])
    assert node.told("a", WANT) == {key(1, 2)}
    theirs = AppliedSet(CHUNKS)
    theirs.add(*key(0, 1 << 60))
    theirs.add(*key(1, 1))
    theirs.add(*key(1, 3))
    node.gossip.known.max_streams = 4
    node.gossip.known.add(*key(3))
    node.gossip.known.max_streams = 2
    node.gossip.on_frame("a", SUMMARY, encoded(Summary(bytes(32), theirs.encode())), 0.0)
    assert node.told("a", WANT) == {key(1, 3)}


# -- comparing ---------------------------------------------------------------------------------------------------------


def exchange_sets(one: Node, other: Node, now: float) -> None:
    """Carry sets between two nodes that know each other as "other" and "one" until neither answers."""
    pending = [(one, other, "one", a) for a in one.gossip.tick(now)] + [(other, one, "other", a) for a in other.gossip.tick(now)]
    while pending:
        sender, receiver, name, action = pending.pop(0)
        assert isinstance(action, Send)
        if action.kind in (SUMMARY, SET_PART):
            back = "other" if name == "one" else "one"
            pending += [(receiver, sender, back, a) for a in receiver.gossip.on_frame(name, action.kind, action.body, now)]


keys = st.sets(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, CHUNKS - 1)), max_size=30)


@settings(deadline=None, max_examples=60)
@given(keys, keys)
def test_two_sets_become_one(mine: set[tuple[int, int, int]], yours: set[tuple[int, int, int]]) -> None:
    one, other = Node("other", seed=1), Node("one", seed=2)
    one.add(*[key(*k) for k in sorted(mine)])
    other.add(*[key(*k) for k in sorted(yours)])
    exchange_sets(one, other, 0.0)
    assert one.gossip.compared and other.gossip.compared
    for _ in range(3 + len(mine | yours)):  # windows are small at first
        for asker, giver, me, you in ((one, other, "one", "other"), (other, one, "other", "one")):
            giver.hears(me, WANT, sorted(asker.told(you, WANT)))
            for body in giver.bodies(me, PACKET):
                k: Key = next(x for x in giver.log.all_keys() if body_of(x) == body)
                if not asker.gossip.known.contains(*k):
                    asker.add(k, source=you)
                else:
                    asker.gossip.heard_again(k, you)
    assert one.gossip.known == other.gossip.known and not one.gossip.backlog() and not other.gossip.backlog()


def test_a_set_too_large_for_one_message_is_told_in_parts_that_cover_it() -> None:
    rng = random.Random(3)
    applied = AppliedSet(64, 4096)
    for _ in range(300):
        name = rng.randbytes(40)
        for chunk in range(64):
            applied.add(name, 1, chunk)
            if rng.random() < 0.5:
                applied.add(name, 3 + rng.randrange(50), chunk)
    most = 6000
    first, covered = b"", AppliedSet(64)
    while True:
        part = part_from(applied, first, most)
        assert len(part.applied) <= most and part.first == first
        told = AppliedSet.decode(part.applied, 64)
        assert told == between(applied, part.first, part.end)
        covered.streams.update(told.streams)
        if not part.end:
            break
        first = part.end
    assert covered == applied


def test_parts_are_compared_within_their_bounds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "set_bytes_max", 200)
    one, other = Node("other", seed=1), Node("one", seed=2)
    one.add(*[key(n) for n in range(1, 20)])
    other.add(*[key(n) for n in range(10, 30)])
    for now in range(0, 200, 10):
        exchange_sets(one, other, float(now))
    wanted_by_one, wanted_by_other = set(), set()
    for now in range(20):
        more = one.told("other", WANT, now), other.told("one", WANT, now)
        one.add(*sorted(more[0]), source="other")
        other.add(*sorted(more[1]), source="one")
        wanted_by_one |= more[0]
        wanted_by_other |= more[1]
    assert wanted_by_one == {key(n) for n in range(20, 30)}
    assert wanted_by_other == {key(n) for n in range(1, 10)}


def test_a_stream_full_of_gaps_is_told_without_them_rather_than_not_sent() -> None:
    applied = AppliedSet(4)
    applied.add(stream(1), 1, 0)
    for seq in range(3, 400, 2):
        applied.add(stream(1), seq, 0)
    applied.add(stream(2), 1, 0)
    part = part_from(applied, b"", 150)
    told = AppliedSet.decode(part.applied, 4)
    assert told.contains(stream(1), 1, 0) and not told.contains(stream(1), 3, 0)
    assert len(part.applied) <= 150
    assert limits.set_bytes_max + 1024 < BULK_BODY_BYTES


def test_huge_claims_are_taken_up_in_bounded_portions_and_do_not_count_as_compared() -> None:
    node = Node("liar")
    theirs = AppliedSet(CHUNKS)
    for chunk in range(CHUNKS):
        theirs.add(stream(1), 1, chunk)
    theirs.streams[stream(1)].contiguous[:] = 1 << 62
    node.gossip.on_frame("liar", SUMMARY, encoded(Summary(bytes(32), theirs.encode())), 0.0)
    assert node.gossip.backlog() == limits.anti_entropy_keys and not node.gossip.compared


def test_more_than_one_portion_is_asked_for_as_soon_as_the_first_is_here() -> None:
    node = Node("a")
    theirs = AppliedSet(CHUNKS)
    for chunk in range(CHUNKS):
        for seq in range(1, limits.anti_entropy_keys // CHUNKS + 100):
            theirs.add(stream(1), seq, chunk)
    node.gossip.tick(0.0)
    node.gossip.on_frame("a", SUMMARY, encoded(Summary(theirs.digest(), theirs.encode(), reply=True)), 0.0)
    assert node.gossip.backlog() == limits.anti_entropy_keys
    node.add(*[k for k in node.gossip._wants._wanted][: limits.anti_entropy_keys - 10], source="a")
    assert SUMMARY in kinds(node.gossip.tick(0.01))


def test_sets_are_told_and_heard_at_a_bounded_pace() -> None:
    node = Node("liar")
    node.add(key(1))
    question = encoded(Summary(bytes(32), b""))
    answers = sum(len(node.gossip.on_frame("liar", SUMMARY, question, 0.0)) for _ in range(100))
    assert answers == limits.sets_told_burst
    whole = encoded(Summary(bytes(32), node.gossip.known.encode(), reply=True))
    with pytest.raises(Refused) as refusal:
        for _ in range(100):
            node.gossip.on_frame("liar", SUMMARY, whole, 0.0)
    assert refusal.value.code == "flood"
    assert len(node.gossip.on_frame("liar", SUMMARY, question, 60.0)) == 1, "later it is answered again"


# -- holding back ------------------------------------------------------------------------------------------------------


def test_during_a_snapshot_nothing_is_pulled_or_compared_and_what_it_brought_is_not_fetched() -> None:
    node = Node("a", "b")
    node.gossip.hold = True
    theirs = AppliedSet(CHUNKS)
    theirs.add(*key(5))
    assert node.gossip.on_frame("a", SUMMARY, encoded(Summary(theirs.digest(), theirs.encode())), 0.0) == []
    assert node.gossip.on_frame("a", SUMMARY, encoded(Summary(theirs.digest(), b"")), 0.0) == []
    node.hears("a", HAVE, [key(1), key(2)])
    assert node.told("a", WANT) == set() and node.gossip.tick(1.0) == []
    snapshot = AppliedSet(CHUNKS)
    snapshot.add(*key(1))
    node.gossip.now_known(snapshot)
    node.gossip.resume()
    assert {a.peer for a in node.gossip.tick(2.0) if isinstance(a, Send) and a.kind == SUMMARY} == {"a", "b"}
    assert node.told("a", WANT, 2.0) == {key(2)}


def test_a_newcomer_is_no_listener_until_it_takes_part() -> None:
    node = Node("newcomer")
    assert not node.gossip.has_listeners()
    node.hears("newcomer", WANT, [key(1)])
    assert node.gossip.has_listeners()


# -- what is malformed -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.sampled_from([HAVE, WANT, MISSING, SUMMARY, SET_PART]), st.binary(max_size=200))
def test_noise_is_refused_and_nothing_else(kind: int, body: bytes) -> None:
    node = Node("a")
    try:
        node.gossip.on_frame("a", kind, body, 0.0)
    except Refused as refusal:
        assert refusal.code in ("bad-message", "bad-applied-set", "too-many-streams")
    assert node.gossip.backlog() == 0


def test_bounds_of_a_part_must_be_bounds() -> None:
    for first, end in ((b"b", b"a"), (b"a", b"a"), (bytes(41), b""), (b"", bytes(41))):
        with pytest.raises(Refused) as refusal:
            Node("a").gossip.on_frame("a", SET_PART, encoded(SetPart(first, end, AppliedSet(CHUNKS).encode())), 0.0)
        assert refusal.value.code == "bad-message"


def test_frames_of_who_is_not_linked_are_nothing() -> None:
    node = Node()
    assert node.gossip.on_frame("stranger", HAVE, b"noise", 0.0) == []
