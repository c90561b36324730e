"""The algebra of owners on random schedules: contributions and sums in any order, lost, repeated; owners that die; work taken back.

Checked, d being on the grid, in whole units: when everything that was published has reached everybody, B + sum of d + sum of what owners
hold back equals the start plus all local moves, to the last bit, whatever happened to contributions; all replicas hold the same bits.
A dead owner's sums count for what it published, and nothing else of it.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.peers.core_kit import Trainer, new_exchange, opened, terms
from tests.peers.test_algebra import whole
from tscale_net.errors import Refused
from tscale_net.identity import verify
from tscale_peers import limits
from tscale_peers.exchange import Exchange, OuterRule
from tscale_peers.packet import Packet, Terms
from tscale_peers.summing import Plan, Summing

PEERS = 4
SUM = OuterRule(grid_displacement=True)

events = st.lists(
    st.one_of(
        st.tuples(st.just("train"), st.integers(0, PEERS - 1), st.floats(1e-5, 1e-2)),
        st.tuples(st.just("contribute"), st.integers(0, PEERS - 1), st.sampled_from([0.05, 1 / 3, 1.0])),
        st.tuples(st.just("publish"), st.integers(0, PEERS - 1), st.sampled_from([0.05, 1 / 3])),
        st.tuples(st.just("hand over"), st.integers(0, PEERS - 1), st.integers(1, 20)),
        st.tuples(st.just("meet"), st.integers(0, PEERS - 1), st.integers(1, 4)),
        st.tuples(st.just("deliver"), st.integers(0, PEERS - 1), st.integers(1, 12)),
        st.tuples(st.just("take back"), st.integers(0, PEERS - 1), st.just(0)),
        st.tuples(st.just("new owners"), st.just(0), st.integers(0, 1 << 20)),
        st.tuples(st.just("die"), st.integers(0, PEERS - 1), st.just(0)),
    ),
    min_size=8,
    max_size=60,
)


class Swarm:
    """Peers around one heap of packets and one of contributions, of which anybody may get any, any number of times, or none."""

    def __init__(self, rule: OuterRule, t: Terms) -> None:
        self.t = t
        self.peers = [new_exchange(k + 1, rule, t) for k in range(PEERS)]
        self.trainers = [Trainer(exchange, seed=k) for k, exchange in enumerate(self.peers)]
        self.summing = [Summing(exchange, exchange._clock) for exchange in self.peers]
        self.dead: set[int] = set()
        self.packets: list[bytes] = []
        self.contributions: list[bytes] = []
        self.start = self.peers[0].replica.basepoint.to(torch.int64)
        self.moved = torch.zeros(t.layout.size, dtype=torch.int64)
        self.plan(random.Random(0))

    def plan(self, rng: random.Random, training_peers: int = 1) -> None:
        keys = [exchange.signer.public_key for exchange in self.peers]
        owners = tuple(rng.choice(keys) for _ in self.t.layout.chunks)
        for key, summing in zip(keys, self.summing, strict=True):
            owned = tuple(chunk for chunk, owner in enumerate(owners) if owner == key)
            summing.plan = Plan(owners, training_peers, owned)

    @property
    def living(self) -> list[Exchange]:
        return [exchange for k, exchange in enumerate(self.peers) if k not in self.dead]

    def train(self, k: int, size: float) -> None:
        before = whole(self.peers[k])
        self.trainers[k].train(size)
        self.moved += whole(self.peers[k]) - before

    def contribute(self, k: int, share: float) -> None:
        before = self.peers[k].weights.clone()
        given, _ = self.summing[k].contribute(1, share)
        assert torch.equal(before, self.peers[k].weights), "giving work away moves no weights"
        self.contributions += [body for body, packet in given if packet.header.owner != self.peers[k].signer.public_key]

    def hand_over(self, k: int, rng: random.Random, count: int) -> None:
        for _ in range(min(count, len(self.contributions))):
            packet = Packet.open_contribution(rng.choice(self.contributions), self.t, verify)
            try:
                self.summing[k].sums.take(packet, 0.0)
            except Refused as refusal:
                assert refusal.code in ("wrong-owner", "contribution-known", "owner-busy")

    def meet(self, k: int, training_peers: int) -> None:
        plan = self.summing[k].plan
        self.summing[k].plan = Plan(plan.owners, training_peers, plan.owned)
        self.packets += [body for _, body in self.summing[k].meet()]
        assert not self.summing[k].refused

    def deliver(self, k: int, rng: random.Random, count: int) -> None:
        if self.packets:
            receipts = self.peers[k].receive(opened([rng.choice(self.packets) for _ in range(count)], self.t))
            assert {r.outcome for r in receipts} <= {"applied", "duplicate"}

    def quiesce(self, rng: random.Random) -> None:
        """Everybody gets every packet, in an order of its own."""
        for exchange in self.living:
            packets = opened(self.packets, self.t)
            rng.shuffle(packets)
            exchange.receive(packets)

    def held_back(self) -> torch.Tensor:
        """What living owners have taken and no sum contains, less what their sums list of it: contributions that wait are still in d."""
        total = torch.zeros(self.t.layout.size, dtype=torch.int64)
        for k in set(range(PEERS)) - self.dead:
            self.packets += [body for _, body in self.summing[k]._publish(self.summing[k].sums.waiting())]
            for index, sum_ in self.summing[k].sums._sums.items():
                self.t.layout.chunks[index].of(total).add_(sum_.units)
        return total


def play(swarm: Swarm, schedule: list[tuple[str, int, float]], seed: int) -> None:
    rng = random.Random(seed)
    for what, k, value in schedule:
        if what == "new owners":
            swarm.plan(random.Random(int(value)))
        elif k in swarm.dead:
            continue
        elif what == "train":
            swarm.train(k, value)
        elif what == "contribute":
            swarm.contribute(k, value)
        elif what == "publish":
            swarm.packets += swarm.peers[k].publish(1, value).packets
        elif what == "hand over":
            swarm.hand_over(k, rng, int(value))
        elif what == "meet":
            swarm.meet(k, int(value))
        elif what == "deliver":
            swarm.deliver(k, rng, int(value))
        elif what == "take back":
            swarm.peers[k].pledges.take_back(0.0, lambda owner: True)
        elif len(swarm.dead) < PEERS - 1:
            swarm.dead.add(k)


@settings(max_examples=30, deadline=None)
@given(events.filter(lambda schedule: all(what != "die" for what, _, _ in schedule)), st.integers(0, 1 << 30))
def test_basepoint_displacements_and_what_owners_hold_back_are_conserved_to_the_last_bit(
    schedule: list[tuple[str, int, float]], seed: int
) -> None:
    swarm = Swarm(SUM, terms())
    play(swarm, schedule, seed)
    held_back = swarm.held_back()
    swarm.quiesce(random.Random(seed))
    assert len({exchange.replica.state() for exchange in swarm.peers}) == 1
    total = swarm.peers[0].replica.basepoint.to(torch.int64) + sum(whole(exchange) for exchange in swarm.peers) + held_back
    assert torch.equal(total, swarm.start + swarm.moved)


@settings(max_examples=30, deadline=None)
@given(events, st.integers(0, 1 << 30))
def test_a_dead_peer_costs_its_own_work_and_what_it_held_back_and_nothing_else(schedule: list[tuple[str, int, float]], seed: int) -> None:
    """What dead peers hold (d, and what they have not published) is counted apart: with it the balance is as exact as before."""
    swarm = Swarm(SUM, terms())
    play(swarm, schedule, seed)
    held_back = swarm.held_back()
    swarm.quiesce(random.Random(seed))
    assert len({exchange.replica.state() for exchange in swarm.living}) == 1
    for exchange in swarm.living:
        exchange.pledges.take_back(0.0, lambda owner: True)
        assert not exchange.pledges.waiting
    lost = torch.zeros_like(swarm.moved)
    for k in swarm.dead:
        # Their own d as it would be if they heard of what they published and others summed of theirs; their sums less what these list.
        swarm.peers[k].receive(opened(swarm.packets, swarm.t))
        lost += whole(swarm.peers[k])
        for index, sum_ in swarm.summing[k].sums._sums.items():
            waiting = _waiting(swarm, k, index)
            swarm.t.layout.chunks[index].of(lost).add_(sum_.units.to(torch.int64) - waiting)
    total = swarm.living[0].replica.basepoint.to(torch.int64) + sum(whole(exchange) for exchange in swarm.living) + held_back + lost
    assert torch.equal(total, swarm.start + swarm.moved)


def _waiting(swarm: Swarm, k: int, index: int) -> torch.Tensor:
    """Contributions that wait at a peer for a sum that never comes: their authors hold them still."""
    chunk = swarm.t.layout.chunks[index]
    total = torch.zeros(chunk.size, dtype=torch.int32)
    waiting = swarm.summing[k].sums._sums[index].waiting
    for exchange in swarm.peers:
        for first, last in waiting.get(exchange.pledges.me, ()):
            for number in range(first, last + 1):
                (packet,) = exchange.pledges._read(index, [number])
                packet.delta.add_to(total)
    return total


@pytest.mark.parametrize("rule", [OuterRule(), OuterRule(own_leak="one", momentum_keep="one")], ids=["sum", "average"])
def test_what_authors_gave_comes_out_in_full(rule: OuterRule) -> None:
    """With no more training, d drains through owners: error feedback on two levels loses nothing."""
    t = terms()
    swarm = Swarm(rule, t)
    for trainer in swarm.trainers:
        trainer.train(1e-2)
    before = [exchange.displacement_norm() for exchange in swarm.peers]
    for _ in range(60):
        for k in range(PEERS):
            swarm.contribute(k, 0.25)
        for k in range(PEERS):
            _hand_over_all(swarm, k)
            swarm.meet(k, 1)
        swarm.quiesce(random.Random(0))
        swarm.packets.clear()
        swarm.contributions.clear()
    for was, exchange in zip(before, swarm.peers, strict=True):
        assert exchange.displacement_norm() < (0.05 if rule.own_leak == "one" else 0.15) * was
        assert exchange.pledges.waiting <= limits.pledges_open * len(t.layout.chunks)
        assert exchange.pledges.confirmed > 50 * len(t.layout.chunks) and not exchange.pledges.taken_back


def _hand_over_all(swarm: Swarm, k: int) -> None:
    for body in swarm.contributions:
        packet = Packet.open_contribution(body, swarm.t, verify)
        if packet.header.owner == swarm.peers[k].signer.public_key:
            swarm.summing[k].sums.take(packet, 0.0)
