"""Whom to ask for what: one at a time, windows, deadlines, denials, and bounds that one neighbour's lies do not get around."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tscale_peers import limits
from tscale_peers.packet import Key
from tscale_peers.wants import WantList


def key(n: int) -> Key:
    return (b"s" * 40, n + 1, 0)


def listed(*peers: str) -> WantList:
    wants = WantList()
    for peer in peers:
        wants.link_up(peer)
    return wants


def test_a_packet_is_asked_of_one_neighbour_until_its_deadline_then_of_another() -> None:
    wants = listed("a", "b")
    assert wants.offer(key(1), "a") and wants.offer(key(1), "b")
    assert wants.asks(0.0) == {"a": [key(1)]}
    assert wants.asks(limits.want_timeout_s - 0.1) == {}
    assert wants.asks(limits.want_timeout_s) == {"b": [key(1)]}
    wants.arrived(key(1), "b")
    assert len(wants) == 0 and wants.asks(1e9) == {}


def test_the_only_one_that_offers_is_asked_a_few_times_then_forgotten() -> None:
    wants = listed("liar")
    wants.offer(key(1), "liar")
    asked = [wants.asks(n * limits.want_timeout_s) for n in range(limits.want_tries + 3)]
    assert [bool(a) for a in asked] == [True] * limits.want_tries + [False] * 3
    assert len(wants) == 0 and wants.unobtainable() == ([], set()), "who never said that it threw it away never had it"


def test_windows_grow_with_deliveries_and_shrink_with_deadlines() -> None:
    wants = listed("slow", "fast")
    for n in range(200):
        wants.offer(key(n), "slow")
        wants.offer(key(n), "fast")
    first = wants.asks(0.0)
    assert {peer: len(keys) for peer, keys in first.items()} == dict.fromkeys(("slow", "fast"), limits.first_packets_in_flight)
    now = 0.0
    while len(wants) > limits.first_packets_in_flight:
        now += 1.0
        for asked in list(first["fast"]):
            wants.arrived(asked, "fast")
        first = {"fast": wants.asks(now).get("fast", [])}
        if not first["fast"]:
            now += limits.want_timeout_s
            first = {"fast": wants.asks(now).get("fast", [])}
    assert wants.window("fast") == limits.packets_in_flight
    assert wants.window("slow") < limits.first_packets_in_flight, "one slow neighbour is asked less and holds nobody up"


def test_denied_by_all_is_unobtainable_and_lies_about_others_do_not_count() -> None:
    wants = listed("a", "b", "liar")
    wants.offer(key(1), "a")
    wants.offer(key(1), "b")
    wants.denies(key(1), "liar")
    wants.denies(key(2), "liar")
    wants.denies(key(1), "a")
    assert wants.unobtainable() == ([], set())
    assert wants.asks(0.0) == {"b": [key(1)]}
    wants.denies(key(1), "b")
    assert wants.unobtainable() == ([key(1)], {"a", "b"})
    assert len(wants) == 0


def test_bad_content_is_not_a_denial() -> None:
    wants = listed("a")
    wants.offer(key(1), "a")
    wants.asks(0.0)
    wants.no_good(key(1), "a")
    assert len(wants) == 0 and wants.unobtainable() == ([], set())
    assert wants.window("a") == 1
    wants.offer(key(1), "a")
    wants.no_good(key(1), "a", blame=False)


def test_an_offer_after_a_denial_counts_again() -> None:
    wants = listed("a", "b")
    wants.offer(key(1), "a")
    wants.denies(key(1), "a")
    wants.offer(key(1), "b")
    assert wants.unobtainable() == ([], set())
    assert wants.asks(0.0) == {"b": [key(1)]}


def test_one_neighbour_cannot_crowd_out_another() -> None:
    wants = listed("liar", "honest")
    taken = sum(wants.offer(key(n), "liar") for n in range(limits.wanted_per_neighbour + 100))
    assert taken == limits.wanted_per_neighbour == len(wants)
    assert wants.offer(key(-2), "honest")
    assert wants.asks(0.0)["honest"] == [key(-2)]
    wants.link_down("liar")
    assert len(wants) == 1
    wants.link_up("liar")
    assert wants.offer(key(5), "liar"), "a new link starts anew"


def test_what_a_lost_link_owes_is_asked_of_others() -> None:
    wants = listed("a", "b")
    wants.offer(key(1), "a")
    wants.offer(key(2), "a")
    wants.offer(key(1), "b")
    wants.asks(0.0)
    wants.link_down("a")
    assert wants.asks(0.1) == {"b": [key(1)]} and len(wants) == 1


_PEERS = ("a", "b", "c")
_steps = st.lists(st.tuples(st.integers(0, 8), st.sampled_from(_PEERS), st.integers(0, 5)), max_size=80)


@settings(deadline=None)
@given(_steps)
def test_the_books_balance_whatever_happens(steps: list[tuple[int, str, int]]) -> None:
    """In flight never exceeds the window; every packet is somewhere; no queue holds what is gone; at the end honest service empties it."""
    wants, now = listed(*_PEERS), 0.0
    for what, peer, n in steps:
        if what in (0, 1):
            wants.offer(key(n), peer)
        elif what == 2:
            wants.arrived(key(n), peer)
        elif what == 3:
            wants.denies(key(n), peer)
        elif what == 4:
            wants.no_good(key(n), peer)
        elif what == 5:
            wants.link_up(peer)
        elif what == 6:
            now += limits.want_timeout_s / 2
        elif what == 7:
            wants.unobtainable()
        wants.asks(now)
        _check_books(wants)
    while len(wants):
        now += limits.want_timeout_s
        for peer, keys in wants.asks(now).items():
            for asked in keys:
                wants.arrived(asked, peer)
        wants.unobtainable()
        _check_books(wants)


def _check_books(wants: WantList) -> None:
    for peer, source in wants._sources.items():
        assert source.in_flight == sum(w.asked_of == peer for w in wants._wanted.values())
        assert source.owned == sum(w.owner == peer for w in wants._wanted.values())
        assert source.queue.keys() <= wants._wanted.keys()
    for wanted_key, wanted in wants._wanted.items():
        assert (wanted.asked_of is not None) == (wanted_key in wants._asked)
        assert (not wanted.offers and wanted.asked_of is None) == (wanted_key in wants._denied)
        if wanted.asked_of is None:
            assert all(wanted_key in wants._sources[peer].queue for peer in wanted.offers)


def test_asking_many_neighbours_is_fair() -> None:
    rng = random.Random(1)
    peers = [f"p{n}" for n in range(5)]
    wants = listed(*peers)
    for n in range(20):
        for peer in rng.sample(peers, 5):
            wants.offer(key(n), peer)
    assert {len(keys) for keys in wants.asks(0.0).values()} == {4}
