"""Meetings and intake with a fake clock: receive before publish, cadence, what hashing may cost, inbox beyond its bytes, a full disk,
turns among neighbours, and what is refused without being the sender's fault."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest
import torch
from core_kit import author, new_exchange, opened, terms
from exchange_kit import ManualHelper, exchange_on

from tscale_net.errors import Refused
from tscale_peers import limits
from tscale_peers.applied import AppliedSet
from tscale_peers.delta_log import MemoryLog
from tscale_peers.errors import refuse
from tscale_peers.gossip import Gossip
from tscale_peers.intake import Intake
from tscale_peers.meeting import MeetingPoint, Met, Progress
from tscale_peers.meeting_time import Seconds
from tscale_peers.packet import Key, Packet


class FakeClock:
    """Moves only when told to, and by `cost_s` whenever it is read while hashing is being timed."""

    def __init__(self) -> None:
        self.time = 100.0
        self.cost_s = 0.0

    def now(self) -> float:
        self.time += self.cost_s
        return self.time

    def wall(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing here may sleep")


class FullLog(MemoryLog):
    """A log on a disk that is full while `full`."""

    full = False

    def append(self, body: bytes, key: Key, fsync: bool = False) -> bool:
        if self.full:
            raise refuse("log-write", "no space")
        return super().append(body, key, fsync)


class Peer:
    """One peer without a loop: exchange, meeting, gossip, intake."""

    def __init__(self, number: int, every: int = 3, helper: Executor | None = None) -> None:
        self.log = FullLog()
        self.exchange = new_exchange(number, log=self.log) if helper is None else exchange_on(number, terms(), log=self.log, helper=helper)
        self.clock = FakeClock()
        self.mets: list[Met] = []
        t = terms()
        self.meeting = MeetingPoint(
            self.exchange, self.exchange.replica, self.log, every, self.clock, lambda body: Packet.decode(body, t), helper
        )
        self.meeting.post = self.mets.append
        self.meeting.may_publish = True
        chunks = len(t.layout.chunks)
        self.gossip = Gossip(AppliedSet(chunks), chunks, self.log, random.Random(1))
        self.intake = Intake(lambda body: opened([body])[0], self.gossip, self.log, self.meeting)
        self.steps = 0

    def step(self, size: float = 1e-3) -> Met:
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        self.exchange.weights.add_(torch.randn(self.exchange.weights.shape, generator=generator) * size)
        return self.meeting.meet(Progress(self.steps, self.steps, self.steps * 10, 1.0, trained=True))

    def publication(self) -> list[bytes]:
        """Packets of one more publication."""
        while True:
            met = self.step()
            if met.published:
                return [body for _, body in met.published]

    def takes(self, body: bytes, source: str = "somebody") -> bool:
        return self.intake.accept(self.intake.check(body), body, source)


def test_published_every_so_many_steps_and_only_if_allowed() -> None:
    peer = Peer(1)
    assert [bool(peer.step().published) for _ in range(7)] == [False, False, True, False, False, True, False]
    peer.meeting.may_publish = False
    assert not any(peer.step().published for _ in range(5))
    peer.meeting.may_publish = True
    assert peer.step().published, "what waited goes out at the next meeting"
    assert not peer.meeting.meet_idle().published
    assert peer.mets[-1].progress == Progress(peer.steps, peer.steps, peer.steps * 10, 1.0, trained=False)


def test_a_restored_run_does_not_publish_at_once() -> None:
    peer = Peer(1)
    peer.meeting.resume_at(Progress(100, 100, 1000, 1.0, trained=False))
    peer.steps = 100
    assert [bool(peer.step().published) for _ in range(3)] == [False, False, True]


def test_what_was_received_is_applied_before_the_own_displacement_is_packed() -> None:
    """Pack after: the publication of one meeting does not contain what the others' packets of the same meeting moved."""
    peer, other = Peer(1), Peer(2)
    bodies = other.publication()
    for _ in range(2):
        peer.step()
    for body in bodies:
        assert peer.takes(body)
    before = peer.exchange.displacement().clone()
    met = peer.step(size=0.0)
    assert [r.outcome for r in met.receipts] == ["applied"] * len(bodies) and met.published
    leaked = before - peer.exchange.displacement()
    own = torch.zeros_like(leaked)
    for packet in opened([body for _, body in met.published]):
        packet.delta.take_from(packet.delta.chunk.of(own), 1.0)  # type: ignore[attr-defined]
    assert torch.allclose(leaked, -own, atol=1e-9), "the displacement gave up the own packet and nothing of the others'"
    weights = peer.exchange.replica.weights() + peer.exchange.displacement()
    assert torch.equal(peer.exchange.weights, weights)


def test_hashing_takes_no_more_than_its_part_of_the_time() -> None:
    peer = Peer(1)
    peer.meeting.may_publish = False
    peer.clock.cost_s = 0.5
    assert peer.step().state is not None
    begun, hashed, meetings = peer.clock.time, 0, 0
    while peer.clock.time - begun < 200:
        peer.clock.time += 0.1
        hashed += peer.step(size=1e-6).state is not None
        meetings += 1
    assert 0 < hashed * 0.5 <= limits.hash_time_fraction * 200 * 1.3
    assert meetings > 10 * hashed
    assert peer.meeting.settle() == peer.exchange.replica.state(), "asked for, it is hashed at once"


def test_packets_beyond_the_inbox_are_read_back_from_the_log_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    peer, other = Peer(1), Peer(2)
    publications = [other.publication() for _ in range(6)]
    size = len(publications[0][0])
    monkeypatch.setattr(limits, "inbox_bytes", 3 * size)
    parts: list[int] = []
    receive = peer.exchange.receive
    monkeypatch.setattr(peer.exchange, "receive", lambda packets: parts.append(len(packets)) or receive(packets))
    for bodies in publications:
        for body in bodies:
            peer.takes(body)
    met = peer.meeting.meet_idle()
    assert [r.outcome for r in met.receipts] == ["applied"] * sum(map(len, publications)) and met.lost == 0
    assert max(parts) <= 4 and peer.meeting.waiting == 0
    assert peer.meeting.settle() == other.meeting.settle()


def test_what_writes_weights_waits_for_the_next_meeting_and_hears_what_it_raised() -> None:
    """A snapshot chunk that comes while a training thread is in the middle of a step must not be written under its hands."""
    peer, donor = Peer(1), Peer(2)
    donor.publication()
    chunk = donor.exchange.replica.read_chunk(0)
    peer.step()
    peer.exchange.weights.add_(1e-3)  # the training thread, half through a step
    weights = peer.exchange.weights.clone()
    good = peer.meeting.between_steps(lambda: peer.meeting.load_chunks({0: chunk}) and None)
    bad = peer.meeting.between_steps(lambda: peer.meeting.load_chunks({1: b"noise"}) and None)
    never = peer.meeting.between_steps(lambda: pytest.fail("cancelled"))
    never.cancel()
    assert torch.equal(peer.exchange.weights, weights) and not good.done()
    before = weights - peer.exchange.replica.weights()
    peer.step(size=0.0)
    assert good.result(timeout=0) is None
    with pytest.raises(Refused):
        bad.result(timeout=0)
    assert torch.allclose(peer.exchange.displacement(), before, atol=1e-6), "the step that was under way is kept"
    assert peer.exchange.replica.chunk_hash(0) == donor.exchange.replica.chunk_hash(0)


def test_a_packet_that_the_log_has_dropped_meanwhile_is_counted_as_lost_and_known_no_more() -> None:
    peer, other = Peer(1), Peer(2)
    body = other.publication()[0]
    key = opened([body])[0].key
    peer.meeting.offer(key)
    assert peer.meeting.meet_idle().lost == 1
    peer.gossip.known.add(*key)
    assert peer.intake.recount(peer.exchange.replica) == []
    assert not peer.gossip.known.contains(*key), "so it is fetched again"


def test_what_the_replica_refused_is_offered_again() -> None:
    """Whether a packet fits in the range depends on what else has come: a later try may succeed, and digests agree again."""
    peer, other = Peer(1), Peer(2)
    bodies = other.publication()
    values = peer.exchange.replica.basepoint.clone()
    peer.exchange.replica.basepoint.fill_(limits.basepoint_range)
    peer.exchange.replica._all_changed()
    for body in bodies:
        peer.takes(body)
    met = peer.meeting.meet_idle()
    assert {r.refusal.code for r in met.receipts if r.refusal} == {"out-of-range"}
    lacking = peer.intake.recount(peer.exchange.replica)
    assert sorted(lacking) == sorted(packet.key for packet in opened(bodies))
    peer.exchange.replica.basepoint.copy_(values)
    peer.exchange.replica._all_changed()
    for key in lacking:
        peer.meeting.offer(key)
    assert {r.outcome for r in peer.meeting.meet_idle().receipts} == {"applied"}
    assert peer.intake.recount(peer.exchange.replica) == []


# -- beside training ---------------------------------------------------------------------------------------------------


def test_with_a_helper_publications_and_hashes_come_at_a_later_meeting_and_nothing_else_changes() -> None:
    helper = ManualHelper()
    peer, plain = Peer(1, helper=helper), Peer(1)
    mets: list[Met] = []
    for _ in range(6):
        mets.append(peer.step())
        plain.step()
        helper.work()
    assert [bool(met.published) for met in mets] == [False, False, False, True, False, False]
    assert [met.state is not None for met in mets] == [False, True, False, True, False, True]
    assert peer.meeting.settle() == plain.meeting.settle(), "both were captured at steps 3 and 6"
    assert peer.mets[-2].published, "what was under way is finished and told first"
    assert len(peer.exchange.replica.applied.seqs(peer.exchange.stream_key, 0)) == 1
    assert peer.exchange.log.latest(peer.exchange.stream_key, 0) == 2


def test_while_one_publication_is_being_made_no_other_begins() -> None:
    helper = ManualHelper()
    peer = Peer(1, helper=helper)
    assert not any(peer.step().published for _ in range(9))
    assert len([1 for future, _ in helper.waiting]) == 2, "one slice and one hash"
    helper.work()
    assert peer.step().published
    helper.work()
    met = peer.step()
    assert met.published and met.published[0][0][1] == 2, "it was due long ago, so it began when the first was ready"


def test_leaving_and_dropping_private_work_finish_what_is_under_way() -> None:
    for act in (lambda p: p.meeting.publish_now(1.0), lambda p: p.meeting.drop_displacement(), lambda p: p.meeting.keep_unpublished(None)):
        with ThreadPoolExecutor(1) as helper:
            peer = Peer(1, helper=helper)
            for _ in range(3):
                peer.step()
            act(peer)
        numbers = [met.published[0][0][1] for met in peer.mets if met.published]
        assert numbers[0] == 1 and len(numbers) == len(set(numbers))
        assert peer.meeting.settle()[0] == peer.exchange.replica.applied.digest()


def test_a_fault_of_the_helper_is_told_as_without_one() -> None:
    helper = ManualHelper()
    peer = Peer(1, helper=helper)
    peer.log.full = True
    withheld = []
    for _ in range(5):
        withheld.append(peer.step().withheld)
        helper.work()
    assert [refusal.code if refusal else "" for refusal in withheld] == ["", "", "", "log-write", ""]
    peer.exchange.weights[0] = math.nan
    with pytest.raises(Refused) as refusal:
        for _ in range(4):
            peer.step()
            helper.work()
    assert refusal.value.code == "not-finite"


def test_applying_takes_no_more_than_its_part_of_the_time() -> None:
    peer, other = Peer(1, every=10**6), Peer(2, every=1)
    applied: list[int] = []
    for _ in range(300):
        peer.clock.time += 1.0
        for body in other.publication():
            peer.takes(body)
        peer.clock.cost_s = 0.05
        applied.append(sum(receipt.outcome == "applied" for receipt in peer.step().receipts))
        peer.clock.cost_s = 0.0
    times = [at for at, count in enumerate(applied) if count]
    assert 20 < len(times) < 100, "now and then"
    assert peer.meeting.time.spent.receive <= limits.receive_time_fraction * peer.clock.time
    assert peer.meeting.settle() == other.meeting.settle()


def test_packets_that_wait_are_applied_at_once_before_a_publication_when_idle_and_when_they_fill_the_inbox(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = Peer(2, every=1)
    body = other.publication()[0]
    for every, trained, room, at_once in (
        (1, True, 1 << 20, True),
        (9, False, 1 << 20, True),
        (9, True, 1, True),
        (9, True, 1 << 20, False),
    ):
        peer = Peer(1, every)
        peer.meeting._receive_after = math.inf
        monkeypatch.setattr(limits, "inbox_bytes", room)
        assert peer.takes(body)
        met = peer.step() if trained else peer.meeting.meet_idle()
        assert bool(met.receipts) == at_once, (every, trained, room)


def test_time_in_meetings_is_told_by_cause() -> None:
    peer, other = Peer(1), Peer(2)
    bodies = other.publication()
    peer.clock.cost_s = 1.0
    assert peer.meeting.time.spent == Seconds()
    peer.step()
    assert peer.meeting.time.spent.hash > 0 and peer.meeting.time.spent.receive == 0
    for body in bodies:
        peer.takes(body)
    peer.step()
    before = peer.meeting.time.spent
    assert before.receive > 0 and before.publish == 0
    peer.step()
    spent = peer.meeting.time.spent.since(before)
    assert spent.publish > 0 and spent.receive == 0
    assert peer.meeting.time.spent.total == sum(peer.meeting.time.spent)
    waiting, free = threading.Event(), threading.Event()

    def hold() -> None:
        with peer.meeting.exclusively():
            waiting.set()
            free.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    waiting.wait()
    threading.Timer(0.01, free.set).start()
    peer.step()
    holder.join()
    assert peer.meeting.time.spent.wait > 0


# -- own publications that cannot be made ------------------------------------------------------------------------------


def test_a_full_disk_withholds_a_publication_and_training_goes_on() -> None:
    peer = Peer(1)
    peer.log.full = True
    mets = [peer.step() for _ in range(7)]
    assert [met.withheld.code if met.withheld else "" for met in mets] == ["", "", "log-write", "", "", "log-write", ""]
    work = peer.exchange.displacement_norm()
    peer.log.full = False
    peer.step()
    met = peer.step()
    assert met.published and met.withheld is None
    assert peer.exchange.displacement_norm() < work, "the work that was kept goes out"


def test_leaving_with_a_full_disk_or_with_broken_weights_says_why() -> None:
    peer = Peer(1)
    peer.step()
    peer.log.full = True
    met = peer.meeting.publish_now(1.0)
    assert met.withheld is not None and met.withheld.code == "log-write" and met.published == ()
    peer.exchange.weights[0] = math.nan
    peer.exchange.mark_trained()
    assert peer.meeting.publish_now(1.0).withheld is not None


def test_weights_that_are_not_finite_end_training() -> None:
    peer = Peer(1)
    with pytest.raises(Refused) as refusal:
        for _ in range(3):
            peer.exchange.weights[5] = math.inf
            peer.step()
    assert refusal.value.code == "not-finite"


# -- intake ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_a_packet_unknown_so_that_it_comes_again() -> None:
    peer, other = Peer(1), Peer(2)
    body = other.publication()[0]
    key = opened([body])[0].key
    peer.gossip.link_up("giver")
    peer.gossip._wants.offer(key, "giver")
    peer.gossip.flush(0.0, lambda p: 0)
    peer.log.full = True
    with pytest.raises(Refused) as refusal:
        peer.takes(body, "giver")
    assert refusal.value.code == "log-write"
    assert not peer.gossip.known.contains(*key) and peer.gossip.backlog() == 1 and peer.meeting.waiting == 0
    peer.log.full = False
    assert peer.takes(body, "giver") and peer.gossip.backlog() == 0


def test_one_stream_too_many_leaves_nothing_in_the_log() -> None:
    peer, other = Peer(1), Peer(2)
    peer.gossip.known.max_streams = 0
    with pytest.raises(Refused) as refusal:
        peer.takes(other.publication()[0])
    assert refusal.value.code == "too-many-streams" and peer.log.all_keys() == []


def test_the_same_packet_again_costs_no_signature_check_and_another_under_its_number_is_refused() -> None:
    peer, other, twin = Peer(1), Peer(2), Peer(2)
    body = other.publication()[0]
    assert not peer.intake.is_known(body, "a") and peer.takes(body)
    assert peer.intake.is_known(body, "a")
    twin.step(0.01)
    second = twin.publication()[0]
    assert opened([second])[0].key == opened([body])[0].key
    assert not peer.intake.is_known(second, "a")
    with pytest.raises(Refused) as refusal:
        peer.takes(second)
    assert refusal.value.code == "equivocation"
    assert not peer.takes(body), "known"


async def test_neighbours_take_turns_and_a_flood_harms_only_its_sender() -> None:
    peer = Peer(1)
    for n in range(limits.verify_queue_packets):
        peer.intake.put("flood", b"%d" % n)
    with pytest.raises(Refused) as refusal:
        peer.intake.put("flood", b"more")
    assert refusal.value.code == "flood"
    peer.intake.put("honest", b"mine")
    assert [await peer.intake.next() for _ in range(3)] == [("flood", b"0"), ("honest", b"mine"), ("flood", b"1")]
    for _ in range(limits.verify_queue_packets - 2):
        await peer.intake.next()
    waiting = asyncio.ensure_future(peer.intake.next())
    await asyncio.sleep(0)
    assert not waiting.done()
    peer.intake.put("honest", b"last")
    assert await waiting == ("honest", b"last")


def test_batches_count_only_as_far_as_packets_bear_them_out() -> None:
    """One packet that claims 2**62 batches must not end everybody's rate schedule."""
    applied = AppliedSet(4)
    key = author(1).public_key + bytes(8)
    applied.add(key, 1, 0)
    applied.note_batches(key, 1 << 62)
    assert applied.total_batches(80) == 80 and applied.total_batches() == 1 << 62
    applied.add(key, 1 << 61, 0)
    assert applied.total_batches(80) == 160, "a skipped number is no packet"
    assert applied.total_batches(80, without=key) == 0
    applied.note_batches(key, 1 << 62)
    other = author(2).public_key + bytes(8)
    applied.add(other, 1, 0)
    applied.note_batches(other, 5)
    assert applied.total_batches(80) == 165
