"""The running average: an oracle that adds up basepoints restricted by date, any order of arrival, restarts, snapshots, clocks ahead."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from core_kit import new_replica, opened, payload_for, sealed, terms
from hypothesis import given, settings
from hypothesis import strategies as st

from tscale_peers import limits
from tscale_peers.average import RunningAverage
from tscale_peers.packet import Key, Packet

CUTS = 4
CUT_S = 10.0
BEGIN = 1_700_000_000 // 40 * 40.0
"""A window begins here."""


def packets(dates: Sequence[float]) -> list[Packet]:
    """One packet of chunk 0 by author 1 for each date, seq from 1."""
    return opened([sealed(payload_for(0, seed=seq), seq=seq, created_unix=date) for seq, date in enumerate(dates, 1)])


class Peer:
    """A replica with its mean, and the packets that it has, readable as from a log."""

    def __init__(self) -> None:
        self.replica = new_replica(terms())
        self.kept: dict[Key, Packet] = {}
        self.average = self.watch()

    def watch(self) -> RunningAverage:
        average = RunningAverage(self.replica, CUT_S * CUTS, CUTS, self.kept.get)
        self.replica.watcher = average
        return average

    def take(self, packet: Packet) -> None:
        self.kept[packet.key] = packet
        self.replica.apply(packet)

    def live(self, arrivals: Sequence[tuple[float, Packet]], until: float, since: float = BEGIN - 2 * CUT_S) -> None:
        """Second by second: what arrives is applied, then cuts that are due are taken."""
        waiting = sorted(arrivals, key=lambda arrival: arrival[0])
        now = since
        while now <= until:
            while waiting and waiting[0][0] <= now:
                self.take(waiting.pop(0)[1])
            self.average.take_due_cuts(now)
            now += 1.0


def oracle(applied: Sequence[Packet], window_begin: float) -> torch.Tensor:
    """The mean by its definition, fp32."""
    total = torch.zeros(new_replica(terms()).layout.size, dtype=torch.float64)
    for cut in range(CUTS):
        replica = new_replica(terms())
        for packet in applied:
            if packet.header.created_unix <= window_begin + cut * CUT_S:
                replica.apply(packet)
        for chunk in replica.layout.chunks:
            for s in chunk.segments:
                units = chunk.of(replica.basepoint)[s.start : s.stop].to(torch.float64)
                chunk.of(total)[s.start : s.stop] += units * s.unit / CUTS
    return total.to(torch.float32)


@settings(max_examples=40, deadline=None)
@given(
    dates=st.lists(st.floats(-15, 75), min_size=1, max_size=8),
    delays=st.lists(st.floats(-25, 60), min_size=8, max_size=8),
)
def test_it_is_the_mean_by_definition_whatever_comes_late_or_is_dated_ahead(dates: list[float], delays: list[float]) -> None:
    peer = Peer()
    made = packets([BEGIN + date for date in dates])
    arrivals = [(max(BEGIN - 15, packet.header.created_unix + delay), packet) for packet, delay in zip(made, delays, strict=False)]
    peer.live(arrivals, BEGIN + 69)
    late = [packet for at, packet in arrivals if at > BEGIN + 69]
    assert peer.average.finished_window == BEGIN // (CUT_S * CUTS)
    mean = peer.average.weights()
    here = [packet for packet in made if packet not in late]
    # A window's cuts lie at its beginning, ten, twenty and thirty seconds after.
    assert mean is not None and torch.equal(mean, oracle(here, BEGIN))


def test_equal_packets_in_another_order_give_equal_bits() -> None:
    made = packets([BEGIN + at for at in (-5, 3, 12, 18, 25, 31, 39)])
    hashes = set()
    for seed in range(4):
        rng = random.Random(seed)
        peer = Peer()
        peer.live([(packet.header.created_unix + rng.uniform(0, 35), packet) for packet in made], BEGIN + 69)
        hashes.add(peer.average.hash())
    assert len(hashes) == 1 and hashes != {b""}


def test_a_packet_that_is_missing_shows_in_the_hash() -> None:
    made = packets([BEGIN + 3, BEGIN + 12])
    all_here, one = Peer(), Peer()
    all_here.live([(packet.header.created_unix, packet) for packet in made], BEGIN + 41)
    one.live([(made[0].header.created_unix, made[0])], BEGIN + 41)
    assert all_here.average.hash() != one.average.hash()
    one.take(made[1])
    assert all_here.average.hash() == one.average.hash()


def test_a_joiner_has_no_mean_of_the_window_in_which_it_came_and_the_right_one_of_the_next() -> None:
    made = packets([BEGIN + at for at in (2, 15, 45, 55, 62)])
    there = Peer()
    there.live([(packet.header.created_unix, packet) for packet in made], BEGIN + 101)
    joiner = Peer()
    donor = Peer()
    for packet in made[:2]:
        donor.take(packet)
    joiner.average.take_due_cuts(BEGIN + 16)
    for chunk in joiner.replica.layout.chunks:
        joiner.replica.load_chunk(chunk.index, donor.replica.read_chunk(chunk.index))
    joiner.live([(packet.header.created_unix, packet) for packet in made[2:]], BEGIN + 69, since=BEGIN + 17)
    assert joiner.average.weights() is None and joiner.average.hash() == b""
    joiner.live([], BEGIN + 101, since=BEGIN + 70)
    assert joiner.average.hash() == there.average.hash() != b""


def test_a_peer_that_was_away_across_cuts_makes_the_same_mean() -> None:
    made = packets([BEGIN + at for at in (1, 11, 14, 28, 33)])
    there = Peer()
    there.live([(packet.header.created_unix, packet) for packet in made], BEGIN + 41)
    away = Peer()
    away.live([(packet.header.created_unix, packet) for packet in made[:2]], BEGIN + 12)
    tensors, facts = away.average.state()
    again = Peer()
    again.replica.restore(away.replica.basepoint, away.replica.applied)
    again.average.restore(tensors, facts)
    for packet in made[2:]:
        again.take(packet)
    again.average.take_due_cuts(BEGIN + 41)
    assert again.average.hash() == there.average.hash() != b""


def test_after_days_away_only_recent_windows_are_made() -> None:
    peer = Peer()
    peer.average.take_due_cuts(BEGIN)
    later = BEGIN + 1000 * CUTS * CUT_S
    assert peer.average.take_due_cuts(later)
    assert peer.average.finished_window == later // (CUTS * CUT_S) - 1
    assert torch.equal(peer.average.weights(), peer.replica.weights())  # type: ignore[arg-type]


def test_a_flood_of_packets_dated_ahead_spoils_a_window_and_no_more() -> None:
    peer = Peer()
    peer.average.take_due_cuts(BEGIN - 15)
    for packet in packets([BEGIN + 75.0] * 3):
        peer.take(packet)
    held = limits.average_ahead_packets
    try:
        limits.average_ahead_packets = 2
        peer.average._remember_ahead(peer.average._ahead.keys().__iter__().__next__(), 1)
        peer.live([], BEGIN + 41, since=BEGIN - 14)
        assert peer.average.weights() is None
    finally:
        limits.average_ahead_packets = held
    peer.live([], BEGIN + 161, since=BEGIN + 42)
    assert peer.average.weights() is not None
