"""The algebra on random schedules: any order, duplication and loss of packets, then anti-entropy.

Checked: equal digests and hashes; B equals B0 plus the applied packets, computed apart; receivers leave d bit-unchanged; B + sum of d is
conserved by every exchange, exactly with d on the grid.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.peers.core_kit import LAYOUT, Trainer, new_exchange, opened, terms
from tests.peers.test_basepoint import independent_sum
from tscale_peers.exchange import Exchange, OuterRule
from tscale_peers.layout import Layout
from tscale_peers.packet import Packet, Terms

PEERS = 3

events = st.lists(
    st.one_of(
        st.tuples(st.just("train"), st.integers(0, PEERS - 1), st.floats(1e-5, 1e-2)),
        st.tuples(st.just("publish"), st.integers(0, PEERS - 1), st.sampled_from([0.05, 1 / 3, 1.0])),
        st.tuples(st.just("deliver"), st.integers(0, PEERS - 1), st.integers(1, 12)),
        st.tuples(st.just("snapshot"), st.integers(0, PEERS - 1), st.integers(0, PEERS - 1)),
    ),
    min_size=5,
    max_size=40,
)


def units(layout: Layout = LAYOUT) -> torch.Tensor:
    return torch.cat([torch.full((spec.size,), 2.0**spec.unit_exponent, dtype=torch.float64) for spec in layout.specs])


def whole(exchange: Exchange) -> torch.Tensor:
    """d in units, as integers."""
    scaled = exchange.displacement().double() / units()
    assert torch.equal(scaled, scaled.round()), "the displacement has left the grid"
    return scaled.to(torch.int64)


class Swarm:
    """Peers that meet through a heap of packets; anybody may get any of them any number of times, or never."""

    def __init__(self, rule: OuterRule, t: Terms) -> None:
        self.t = t
        self.rule = rule
        self.peers = [new_exchange(k + 1, rule, t) for k in range(PEERS)]
        self.trainers = [Trainer(exchange, seed=k) for k, exchange in enumerate(self.peers)]
        self.bodies: list[bytes] = []
        self.moved = torch.zeros(t.layout.size, dtype=torch.int64)
        """All local moves on the grid."""

    def train(self, k: int, size: float) -> None:
        before = whole(self.peers[k]) if self.rule.grid_displacement else None
        self.trainers[k].train(size)
        if before is not None:
            self.moved += whole(self.peers[k]) - before

    def publish(self, k: int, share: float) -> None:
        bodies = self.peers[k].publish(1, share).packets
        for body in bodies:
            (packet,) = opened([body], self.t)
            assert self.peers[k].log.get(packet.key) == body
        self.bodies += bodies

    def deliver(self, k: int, rng: random.Random, count: int) -> None:
        if not self.bodies:
            return
        packets = opened([rng.choice(self.bodies) for _ in range(count)], self.t)
        own = self.peers[k].stream_key
        before = self.peers[k].displacement().clone()
        receipts = self.peers[k].receive(packets)
        assert [r.key for r in receipts] == [p.key for p in packets]
        assert {r.outcome for r in receipts} <= {"applied", "duplicate"}
        assert all(r.outcome == "duplicate" for r in receipts if r.key[0] == own)
        assert torch.equal(before.view(torch.int32), self.peers[k].displacement().view(torch.int32)), "a receiver's d changed"
        self.check_weights(k)

    def snapshot(self, k: int, donor: int, rng: random.Random) -> None:
        index = rng.randrange(len(self.t.layout.chunks))
        before = self.peers[k].displacement().clone()
        assert self.peers[k].load_chunks({index: self.peers[donor].replica.read_chunk(index)}) == []
        assert torch.equal(before.view(torch.int32), self.peers[k].displacement().view(torch.int32))
        self.check_weights(k)

    def check_weights(self, k: int) -> None:
        exchange = self.peers[k]
        held = exchange.replica.weights() + exchange.displacement()
        slack = 0.51 * units() if self.rule.grid_displacement else torch.zeros(1, dtype=torch.float64)
        assert torch.all((exchange.weights.double() - held.double()).abs() <= slack + 1e-7)

    def anti_entropy(self, rng: random.Random) -> None:
        """Each pulls what it lacks from the others' logs, pair by pair."""
        for k in rng.sample(range(PEERS), PEERS):
            for donor in rng.sample(range(PEERS), PEERS):
                mine, theirs = self.peers[k].replica.applied_copy(), self.peers[donor].replica.applied_copy()
                lacking = [
                    (stream, seq, chunk) for stream, chunk, first, last in mine.missing_from(theirs) for seq in range(first, last + 1)
                ]
                rng.shuffle(lacking)
                heap = {packet.key: packet for packet in opened(self.bodies, self.t)}
                self.peers[k].receive([heap[key] for key in lacking])

    def check_agreement(self) -> list[Packet]:
        assert len({exchange.replica.state() for exchange in self.peers}) == 1
        packets = opened(self.bodies, self.t)
        for exchange in self.peers:
            assert all(exchange.replica.applied.contains(*packet.key) for packet in packets)
        return packets


def play(swarm: Swarm, schedule: list[tuple[str, int, float]], seed: int) -> None:
    rng = random.Random(seed)
    for what, k, value in schedule:
        if what == "train":
            swarm.train(k, value)
        elif what == "publish":
            swarm.publish(k, value)
        elif what == "deliver":
            swarm.deliver(k, rng, int(value))
        else:
            swarm.snapshot(k, int(value), rng)
    for _ in range(2):
        swarm.anti_entropy(rng)


@settings(max_examples=40, deadline=None)
@given(events, st.integers(0, 1 << 30))
def test_sum_rule_on_the_grid_conserves_basepoint_plus_displacements_to_the_last_bit(
    schedule: list[tuple[str, int, float]], seed: int
) -> None:
    swarm = Swarm(OuterRule(grid_displacement=True), terms())
    start = swarm.peers[0].replica.basepoint.to(torch.int64)
    play(swarm, schedule, seed)
    packets = swarm.check_agreement()
    for exchange in swarm.peers:
        assert torch.equal(exchange.replica.basepoint.to(torch.int64), independent_sum(packets))
    total = swarm.peers[0].replica.basepoint.to(torch.int64) + sum(whole(exchange) for exchange in swarm.peers)
    assert torch.equal(total, start + swarm.moved)


@pytest.mark.parametrize("rule", [OuterRule(), OuterRule(own_leak="one", momentum_keep="one")], ids=["sum", "average"])
@settings(max_examples=25, deadline=None)
@given(schedule=events, seed=st.integers(0, 1 << 30))
def test_off_the_grid_replicas_agree_as_exactly(rule: OuterRule, schedule: list[tuple[str, int, float]], seed: int) -> None:
    swarm = Swarm(rule, terms())
    play(swarm, schedule, seed)
    packets = swarm.check_agreement()
    for exchange in swarm.peers:
        assert torch.equal(exchange.replica.basepoint.to(torch.int64), independent_sum(packets))


@pytest.mark.parametrize("codec", ["sign", "exact"])
def test_off_the_grid_the_sum_rule_conserves_to_fp32_rounding(codec: str) -> None:
    t = terms(codec)
    swarm = Swarm(OuterRule(), t)
    moves = torch.zeros(LAYOUT.size, dtype=torch.float64)
    rng = random.Random(1)
    start = swarm.peers[0].replica.weights().double()
    for _ in range(30):
        for k in range(PEERS):
            moves += swarm.trainers[k].train().double()
            swarm.publish(k, 1 / PEERS)
        for k in range(PEERS):
            swarm.deliver(k, rng, 20)
    for _ in range(2):
        swarm.anti_entropy(rng)
    swarm.check_agreement()
    total = swarm.peers[0].replica.weights().double() + sum(e.displacement().double() for e in swarm.peers)
    assert (total - start - moves).abs().max() < 30 * PEERS * 2.0**-24


@pytest.mark.parametrize("codec", ["sign", "exact"])
def test_the_averaging_rule_conserves_the_weighted_sum(codec: str) -> None:
    """B + sum of share * d changes by local training alone, up to the rounding of steps to units (leak * c = c exactly then)."""
    t = terms(codec)
    swarm = Swarm(OuterRule(own_leak="one", momentum_keep="one"), t)
    shares = [0.5, 0.25, 0.25]
    moves = torch.zeros(LAYOUT.size, dtype=torch.float64)
    start = swarm.peers[0].replica.weights().double()
    rng = random.Random(2)
    for _ in range(20):
        for k in range(PEERS):
            moves += shares[k] * swarm.trainers[k].train().double()
            swarm.publish(k, shares[k])
    for _ in range(2):
        swarm.anti_entropy(rng)
    swarm.check_agreement()
    total = swarm.peers[0].replica.weights().double()
    total += sum(share * e.displacement().double() for share, e in zip(shares, swarm.peers, strict=True))
    assert (total - start - moves).abs().max() < 20 * PEERS * 2.0**-23
