"""Snapshot or log: the cheaper one, on the word of enough neighbours, without losing anything, and not for ever."""

from __future__ import annotations

import pytest

from tscale_peers import limits
from tscale_peers.assembly import RunTerms
from tscale_peers.catch_up import CatchUp, Costs, Verdict
from tscale_peers.simulation import small_run

COSTS = Costs(packet_bytes=(100, 100), chunk_bytes=(1000, 5000))
MUCH = {0: 11}
"""1100 bytes of packets for a chunk of 1000."""


def weigh(catch_up: CatchUp, peer: str = "a", missing: dict[int, int] = MUCH, **changes: object) -> Verdict:
    given: dict[str, object] = {"is_author": True, "neighbours": 1, "recoverable": lambda chunk: True, "now": 0.0} | changes
    return catch_up.weigh(peer, missing, **given)  # type: ignore[arg-type]


def test_each_chunk_takes_the_cheaper_way() -> None:
    verdict = weigh(CatchUp(COSTS, 0), missing={0: 11, 1: 50})
    assert verdict == Verdict((0,), ("a",), frozenset({0})), "50 packets of chunk 1 are as many bytes as the chunk: the log stays"
    assert weigh(CatchUp(COSTS, 0), missing={0: 10, 1: 51}).fetch == (1,)


def test_little_comes_as_packets_whatever_chunks_cost() -> None:
    assert weigh(CatchUp(COSTS, 1101)) == Verdict()
    assert weigh(CatchUp(COSTS, 1100)).fetch == (0,)


def test_one_of_several_neighbours_is_not_enough_and_only_authors_give() -> None:
    catch_up = CatchUp(COSTS, 0)
    assert weigh(catch_up, "a", neighbours=3) == Verdict((), (), frozenset({0})), "its packets wait for a second opinion"
    assert weigh(catch_up, "b", neighbours=3, is_author=False, now=1.0) == Verdict((0,), ("a",), frozenset({0}))
    strangers = CatchUp(COSTS, 0)
    assert not weigh(strangers, "a", is_author=False, neighbours=3).fetch
    assert not weigh(strangers, "b", is_author=False, neighbours=3).fetch


def test_without_a_second_opinion_the_log_is_used_in_the_end() -> None:
    catch_up = CatchUp(COSTS, 0)
    assert weigh(catch_up, neighbours=3).leave == {0}
    assert weigh(catch_up, neighbours=3, now=limits.catch_up_patience_s) == Verdict()


def test_what_only_this_peer_has_must_be_in_its_log() -> None:
    assert weigh(CatchUp(COSTS, 0), recoverable=lambda chunk: chunk != 0) == Verdict()


def test_while_a_chunk_is_fetched_its_packets_are_left_alone_and_afterwards_they_are_not() -> None:
    catch_up = CatchUp(COSTS, 0)
    assert weigh(catch_up).fetch == (0,)
    assert weigh(catch_up, now=1.0) == Verdict((), (), frozenset({0}))
    catch_up.fetching.discard(0)
    assert weigh(catch_up, now=2.0) == Verdict(), "tried lately: what it still lacks comes from logs"
    assert weigh(catch_up, now=limits.catch_up_again_s).fetch == (0,)


@pytest.mark.parametrize("codec", ["sign", "exact"])
def test_costs_follow_from_the_codec(codec: str) -> None:
    manifest, _ = small_run(chunk_params=1 << 12, codec=codec)
    costs = Costs.of(RunTerms.of(manifest).terms)
    assert len(costs.packet_bytes) == len(costs.chunk_bytes) == 1
    assert costs.chunk_bytes[0] > 4 * 4096
    assert costs.packet_bytes[0] >= (4096 // 8 if codec == "sign" else 4 * 4096)
