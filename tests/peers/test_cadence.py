"""Capacity of a link, the pace that follows from everybody's, and limits of download."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscale_net.ports import Clock, Rng
from tscale_net.token_bucket import TokenBucket
from tscale_net.virtual_time import run_virtual
from tscale_peers import limits
from tscale_peers.cadence import NO_BOUND, LinkOf, Pacer, Standing, pace, slowest_useful
from tscale_peers.capacity import Capacity
from tscale_peers.simulation import SimulatedSwarm, small_run
from tscale_peers.wants import WantList

MEGA = 1e6


# -- capacity ----------------------------------------------------------------------------------------------------------


def test_a_link_that_is_never_behind_has_no_known_bound() -> None:
    capacity = Capacity(None, 0.0)
    for second in range(1, 100):
        capacity.note(second * 5e6, False, float(second))
    assert capacity.bytes_per_s is None


def test_being_behind_without_a_break_measures_what_comes() -> None:
    capacity = Capacity(None, 0.0)
    for tick in range(1, 41):
        capacity.note(tick * 25_000, True, tick * 0.25)
    assert capacity.bytes_per_s is None, "ten seconds of it have not passed yet"
    for tick in range(41, 60):
        capacity.note(tick * 25_000, True, tick * 0.25)
    assert capacity.bytes_per_s == pytest.approx(100_000)


def test_a_moment_behind_is_no_measurement() -> None:
    capacity = Capacity(None, 0.0)
    for tick in range(400):
        capacity.note(tick * 1000, tick % 40 != 0, tick * 0.25)
    assert capacity.bytes_per_s is None


def test_an_estimate_rises_while_the_peer_keeps_up_and_is_forgotten() -> None:
    capacity = Capacity(None, 0.0)
    for second in range(13):
        capacity.note(second * 1000, True, float(second))
    low = capacity.bytes_per_s
    assert low == pytest.approx(1000)
    for second in range(13, 73):
        capacity.note(13_000, False, float(second))
    risen = capacity.bytes_per_s
    assert risen is not None and 2.5 * low < risen < 2.9 * low
    for second in range(73, 300):
        capacity.note(13_000, False, float(second))
    assert capacity.bytes_per_s is None


def test_what_the_owner_allows_is_a_bound_without_measuring() -> None:
    capacity = Capacity(500.0, 0.0)
    assert capacity.bytes_per_s == 500.0
    for second in range(13):
        capacity.note(second * 100, True, float(second))
    assert capacity.bytes_per_s == pytest.approx(100)


# -- pace --------------------------------------------------------------------------------------------------------------


def test_the_interval_lets_all_publications_through_the_slowest_useful_link() -> None:
    links = [LinkOf("fat", 0.0, 100.0), LinkOf("home", 12.5 * MEGA, 100.0), LinkOf("slow", 1.25 * MEGA, 100.0)]
    found = pace(25 * MEGA, 2, links, None)
    assert found.interval_s == pytest.approx(2 * 25 / (limits.link_part * 1.25))
    assert "slow" in found.reason and "10 Mbit/s" in found.reason


def test_a_thin_peer_that_does_little_is_not_waited_for() -> None:
    links = [LinkOf("fat", 0.0, 1000.0), LinkOf("home", 12.5 * MEGA, 500.0), LinkOf("thin", 0.1 * MEGA, 50.0)]
    found = slowest_useful(links)
    assert found is not None and found.name == "home"
    lazy = [LinkOf("fat", 0.0, 1000.0), LinkOf("thin", 0.1 * MEGA, 100.0)]
    assert slowest_useful(lazy) is None and pace(25 * MEGA, 1, lazy, None) == NO_BOUND


def test_who_does_nothing_is_not_waited_for_and_nobody_divides_by_zero() -> None:
    assert slowest_useful([LinkOf("relay", 1000.0, 0.0)]) is None
    assert pace(0, 5, [LinkOf("home", 1000.0, 10.0)], 1000.0).interval_s == 0


def test_the_own_uplink_bounds_the_own_pace_only() -> None:
    links = [LinkOf("me", 0.0, 10.0), LinkOf("other", 0.0, 10.0)]
    found = pace(10 * MEGA, 1, links, 0.5 * MEGA)
    assert found.interval_s == pytest.approx(limits.own_sends * 10 / (limits.link_part * 0.5)) and "this peer" in found.reason
    assert pace(10 * MEGA, 1, links, None) == NO_BOUND


@given(
    links=st.lists(st.builds(LinkOf, st.just("x"), st.floats(0, 1e9), st.floats(0, 1e12)), max_size=12),
    received=st.floats(0, 300),
    nbytes=st.floats(0, 1e10),
)
def test_no_word_of_others_makes_a_peer_wait_for_ever(links: list[LinkOf], received: float, nbytes: float) -> None:
    assert 0 <= pace(nbytes, received, links, 1.0).interval_s <= limits.pace_interval_max_s


def test_the_passed_over_do_at_most_their_part_of_the_work() -> None:
    rng = random.Random(3)
    for _ in range(300):
        links = [LinkOf(str(n), rng.choice([0.0, rng.expovariate(1e-6)]), rng.random()) for n in range(rng.randint(1, 20))]
        found = slowest_useful(links)
        bound = found.down_bytes_per_s if found else float("inf")
        passed = sum(link.tokens_per_s for link in links if 0 < link.down_bytes_per_s < bound)
        assert passed <= limits.thin_share * sum(link.tokens_per_s for link in links) + 1e-12


def test_a_pacer_measures_only_when_more_than_a_round_is_missing() -> None:
    pacer = Pacer(None, None, 0.0)
    for second in range(30):
        pacer.measure(Standing(second * 1000, 0, backlog=40, unheld=0, chunks=10, live=4), float(second))
    assert pacer.down.bytes_per_s is None
    for second in range(30, 60):
        pacer.measure(Standing(second * 1000, 0, backlog=41, unheld=0, chunks=10, live=4), float(second))
    assert pacer.down.bytes_per_s == pytest.approx(1000)
    pacer.choose(3000.0, 3, LinkOf("me", 1000.0, 10.0), [])
    assert pacer.next_at(100.0) == 100.0 + pacer.pace.interval_s > 101
    assert pacer.next_at(None) < 0, "the first publication waits for nothing"


# -- limit of downloads ------------------------------------------------------------------------------------------------


def test_packets_are_asked_for_no_faster_than_allowed() -> None:
    async def ask(clock: Clock, rng: Rng) -> list[int]:
        bucket = TokenBucket(1000.0, clock)
        wants = WantList()
        wants.link_up("peer")
        for seq in range(1, 200):
            wants.offer((b"s" * 40, seq, 0), "peer")
        asked = []
        for _ in range(40):
            await clock.sleep(0.25)
            keys = wants.asks(clock.now(), lambda: bucket.try_borrow(500.0)).get("peer", [])
            asked.append(len(keys))
            for key in keys:
                wants.arrived(key, "peer")
        return asked

    asked = run_virtual(ask)
    assert 18 <= sum(asked) <= 22 and max(asked) <= 2


@pytest.mark.parametrize("peers", [1, 3])
def test_where_links_ask_for_nothing_everybody_publishes_as_often_as_the_run_says(peers: int) -> None:
    manifest, start = small_run(publish_every_steps=3)

    async def train(clock: Clock, rng: Rng) -> list[tuple[int, int]]:
        swarm = SimulatedSwarm(manifest, start, clock, rng, latency_s=0.01)
        address = await swarm.found(swarm.add(step_s=0.1))
        for _ in range(peers - 1):
            await swarm.join(swarm.add(step_s=0.1), address)
        await clock.sleep(5)
        before = [(sim.steps, sim.peer.published if sim.peer else 0) for sim in swarm.peers]
        await clock.sleep(30)
        after = [(sim.steps, sim.peer.published if sim.peer else 0) for sim in swarm.peers]
        await swarm.end()
        return [(now[0] - was[0], now[1] - was[1]) for was, now in zip(before, after, strict=True)]

    for steps, published in run_virtual(train):
        assert published >= 0.8 * steps / 3
