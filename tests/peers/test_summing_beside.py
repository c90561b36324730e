"""Sums made beside training: whatever happens between the moment at which a sum is made and the one at which it counts, nothing is lost."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.peers.core_kit import opened, terms
from tests.peers.exchange_kit import ManualHelper
from tests.peers.test_algebra import whole
from tests.peers.test_owners_algebra import PEERS, SUM, Swarm, events, play
from tscale_net.identity import verify
from tscale_peers.packet import Packet


class BesideSwarm(Swarm):
    """Each peer's helper works when something is delivered to it."""

    def __init__(self) -> None:
        super().__init__(SUM, terms())
        self.helpers = [ManualHelper() for _ in self.peers]
        for exchange, helper in zip(self.peers, self.helpers, strict=True):
            exchange.helper = helper

    def deliver(self, k: int, rng: random.Random, count: int) -> None:
        self.helpers[k].work()
        super().deliver(k, rng, count)

    def held_back(self) -> torch.Tensor:
        for exchange, helper in zip(self.peers, self.helpers, strict=True):
            helper.work()
            exchange.helper = None
        return super().held_back()


@settings(max_examples=40, deadline=None)
@given(events.filter(lambda schedule: all(what != "die" for what, _, _ in schedule)), st.integers(0, 1 << 30))
def test_everything_is_conserved_to_the_last_bit(schedule: list[tuple[str, int, float]], seed: int) -> None:
    swarm = BesideSwarm()
    play(swarm, schedule, seed)
    held_back = swarm.held_back()
    swarm.quiesce(random.Random(seed))
    assert len({exchange.replica.state() for exchange in swarm.peers}) == 1
    total = swarm.peers[0].replica.basepoint.to(torch.int64) + sum(whole(exchange) for exchange in swarm.peers) + held_back
    assert torch.equal(total, swarm.start + swarm.moved)


def test_a_sum_counts_when_it_is_in_the_log_and_what_comes_meanwhile_goes_into_the_next() -> None:
    swarm = BesideSwarm()
    owner = swarm.peers[0].signer.public_key
    plan = swarm.summing[0].plan
    for summing in swarm.summing:
        summing.plan = type(plan)(tuple(owner for _ in plan.owners), 1, tuple(range(len(plan.owners))))
    exchange, summing = swarm.peers[0], swarm.summing[0]

    def take(k: int) -> None:
        swarm.train(k, 1e-3)
        given, _ = swarm.summing[k].contribute(1, 0.5)
        for body, _ in given:
            summing.sums.take(Packet.open_contribution(body, swarm.t, verify), 0.0)

    take(1)
    assert summing.meet() == [] and exchange.log.keys(summing.stream_key) == []
    swarm.helpers[0].work()
    take(2)
    assert exchange.log.keys(summing.stream_key) and not exchange.replica.applied.streams, "durable, and nobody knows of it"
    first = summing.meet()
    assert len(first) == len(swarm.t.layout.chunks) and {packet.seq for packet in opened([body for _, body in first], swarm.t)} == {1}
    assert summing.sums.waiting(), "the second contributions"
    swarm.helpers[0].work()
    second = summing.meet()
    assert {packet.seq for packet in opened([body for _, body in second], swarm.t)} == {2} and not summing.sums.waiting()
    assert PEERS > 2 and not summing.refused
