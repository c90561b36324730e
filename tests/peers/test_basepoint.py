"""The replica: exact sums in any order, range, hash, snapshot chunks from several donors."""

from __future__ import annotations

import random
import threading

import lz4.block
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.peers.core_kit import LAYOUT, key_of, new_replica, opened, payload_for, sealed, start_weights, terms
from tscale_net.errors import Refused
from tscale_peers import limits, snapshot_chunk
from tscale_peers.basepoint import Replica
from tscale_peers.delta_batch import add_all
from tscale_peers.packet import Packet


def packets(authors: int = 3, seqs: int = 4) -> list[Packet]:
    bodies = [
        sealed(payload_for(chunk, seed=100 * number + 10 * seq + chunk), number, seq=seq, chunk=chunk, batches_total=5 * seq)
        for number in range(1, authors + 1)
        for seq in range(1, seqs + 1)
        for chunk in range(len(LAYOUT.chunks))
    ]
    return opened(bodies)


ALL = packets()


def independent_sum(listed: list[Packet]) -> torch.Tensor:
    """B0 + all deltas, with nothing of the replica's code but the decoded payloads."""
    units = torch.cat([torch.full((spec.size,), 2.0**spec.unit_exponent, dtype=torch.float64) for spec in LAYOUT.specs])
    total = torch.round(start_weights().double() / units).to(torch.int64)
    for packet in listed:
        steps, bits = packet.delta.placed.on(torch.device("cpu"))  # type: ignore[attr-defined]
        steps = steps.repeat_interleave(torch.cat([torch.full((s.rows,), s.cols) for s in LAYOUT.chunks[packet.chunk].segments]))
        negative = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1).bool()
        LAYOUT.chunks[packet.chunk].of(total).add_(torch.where(negative, -steps, steps))
    return total


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_order_and_duplication_give_the_same_bits(rng: random.Random) -> None:
    schedule = ALL + rng.sample(ALL, len(ALL) // 2)
    rng.shuffle(schedule)
    replica = new_replica(terms())
    fresh = sum(replica.apply(packet) for packet in schedule)
    assert fresh == len(ALL)
    assert torch.equal(replica.basepoint.to(torch.int64), independent_sum(ALL))
    straight = new_replica(terms())
    for packet in ALL:
        straight.apply(packet)
    assert replica.state() == straight.state()
    assert replica.applied.total_batches() == 3 * 20


def test_different_sets_give_different_states() -> None:
    replica, states = new_replica(terms()), set()
    for packet in ALL:
        replica.apply(packet)
        states.add(replica.state())
    assert len({digest for digest, _ in states}) == len({value for _, value in states}) == len(ALL)


def test_the_hash_is_that_of_the_chunks_hashes_of_little_endian_int32() -> None:
    replica = new_replica(terms())
    for packet in ALL[:5]:
        replica.apply(packet)
        replica.hash()
    parts = [blake3(chunk.of(replica.basepoint).numpy().astype("<i4").tobytes()).digest() for chunk in LAYOUT.chunks]
    assert replica.hash() == blake3(b"".join(parts)).digest()


def test_recent_states_are_bounded_and_hold_no_state_twice() -> None:
    replica = new_replica(terms())
    seen = []
    for packet in ALL:
        replica.apply(packet)
        seen.append(replica.state())
        replica.state()
    assert list(replica.recent) == seen[-limits.recent_states :]


def test_weights_are_the_integers_times_the_units() -> None:
    replica = new_replica(terms())
    want = torch.cat(
        [(replica.basepoint[o : o + s.size] * 2.0**s.unit_exponent) for s, o in zip(LAYOUT.specs, LAYOUT.offsets, strict=True)]
    )
    assert torch.equal(replica.weights(), want)
    assert (replica.weights() - start_weights()).abs().max() <= 2.0**-19


# -- range ---------------------------------------------------------------------------------------------------------------


def at_the_edge(units_left: int) -> Replica:
    replica = new_replica(terms())
    values = replica.basepoint.clone()
    values[0], values[1] = limits.basepoint_range - units_left, -limits.basepoint_range + units_left
    replica.restore(values, replica.applied)
    return replica


def test_a_packet_that_would_leave_the_range_is_refused_before_anything_changes() -> None:
    packet = next(p for p in ALL if p.chunk == 0)
    replica = at_the_edge(0)
    before = replica.state()
    with pytest.raises(Refused, match="wide") as caught:
        replica.apply(packet)
    assert caught.value.code == "out-of-range"
    assert replica.state() == before and not replica.applied.contains(*packet.key)


def test_a_refusal_for_the_range_is_not_for_ever() -> None:
    packet = next(p for p in ALL if p.chunk == 0)
    replica = at_the_edge(0)
    with pytest.raises(Refused):
        replica.apply(packet)
    replica.restore(new_replica(terms()).basepoint, replica.applied)
    assert replica.apply(packet)


def test_a_packet_that_moves_inward_at_the_edge_is_taken() -> None:
    """The cheap bound says no, the values themselves say yes."""
    packet = next(p for p in ALL if p.chunk == 0)
    moved = torch.zeros(LAYOUT.chunks[0].size, dtype=torch.int32)
    packet.delta.add_to(moved)
    replica = new_replica(terms())
    values = replica.basepoint.clone()
    values[0] = limits.basepoint_range if moved[0] < 0 else -limits.basepoint_range
    replica.restore(values, replica.applied)
    assert replica.apply(packet)
    assert int(replica.basepoint[0]) == int(values[0]) + int(moved[0])


def test_the_running_bound_is_never_below_the_values() -> None:
    replica = new_replica(terms())
    for packet in ALL:
        replica.apply(packet)
        chunk = LAYOUT.chunks[packet.chunk]
        assert replica._bounds[packet.chunk] >= int(chunk.of(replica.basepoint).abs().max())


@pytest.mark.parametrize(("value", "code"), [(float("nan"), "not-finite"), (1e9, "out-of-range")])
def test_start_weights_off_the_grid_are_refused_by_name(value: float, code: str) -> None:
    weights = start_weights()
    weights[LAYOUT.offsets[2] + 3] = value
    replica = new_replica(terms())
    before = replica.state()
    with pytest.raises(Refused, match="tall") as caught:
        replica.set_start(weights)
    assert caught.value.code == code and replica.state() == before


def test_a_checkpoint_of_another_run_is_refused() -> None:
    replica = new_replica(terms())
    for wrong in (replica.basepoint[:-1], replica.basepoint.float()):
        with pytest.raises(Refused) as caught:
            replica.restore(wrong, replica.applied)
        assert caught.value.code == "bad-checkpoint"


# -- snapshots -----------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False))
def test_chunks_from_donors_with_different_sets_and_a_replay_give_the_same_hash(rng: random.Random) -> None:
    donors = []
    for _ in range(3):
        donor = new_replica(terms())
        for packet in rng.sample(ALL, rng.randrange(len(ALL))):
            donor.apply(packet)
        donors.append(donor)
    joiner = Replica(LAYOUT, terms().codec)
    for packet in rng.sample(ALL, 5):  # what a joiner applied before the snapshot came is replaced together with its entries
        joiner.apply(packet)
    for chunk in LAYOUT.chunks:
        joiner.load_chunk(chunk.index, rng.choice(donors).read_chunk(chunk.index))
    replay = list(ALL)
    rng.shuffle(replay)
    for replica in (joiner, *donors):
        for packet in replay:
            replica.apply(packet)
    assert len({replica.state() for replica in (joiner, *donors)}) == 1
    assert joiner.applied.batches == {key_of(number): 20 for number in (1, 2, 3)}


def test_a_chunk_is_compressed_only_where_it_gains() -> None:
    small = torch.randint(-1000, 1000, (4096,), dtype=torch.int32)
    noise = torch.randint(-(1 << 30), 1 << 30, (4096,), dtype=torch.int32)
    for values, packing in ((small, snapshot_chunk.PLANES), (noise, snapshot_chunk.PLAIN)):
        data = snapshot_chunk.encode(3, values, [])
        assert data[1] == packing
        back, entries = snapshot_chunk.decode(data, 3, 4096, torch.int32, 10)
        assert torch.equal(back, values) and entries == []
    assert len(snapshot_chunk.encode(3, small, [])) < 0.7 * 4 * 4096


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64))
def test_packing_is_exact_for_all_integers(listed: list[int]) -> None:
    values = torch.tensor(listed * 8, dtype=torch.int32)
    data = snapshot_chunk.encode(0, values, [])
    assert torch.equal(snapshot_chunk.decode(data, 0, len(values), torch.int32, 1)[0], values)


def bad_chunks() -> dict[str, bytes]:
    replica = new_replica(terms())
    for packet in ALL:
        replica.apply(packet)
    good = replica.read_chunk(0)
    values = LAYOUT.chunks[0].of(replica.basepoint)
    outside = values.clone()
    outside[0] = limits.basepoint_range + 1
    planes = lz4.block.compress(bytes(4 * (LAYOUT.chunks[0].size + 1)), store_size=False)
    return {
        "empty": b"",
        "head only": good[:5],
        "other chunk": replica.read_chunk(1),
        "truncated": good[:-1],
        "longer": good + b"\0",
        "version": b"\x07" + good[1:],
        "packing": good[:1] + b"\x09" + good[2:],
        "entries too long": good[:6] + b"\xff\xff\xff\x7f" + good[10:],
        "entries damaged": good[:10] + b"\x05" + good[11:],
        "too many streams": snapshot_chunk.encode(0, values, replica.applied.chunk_entries(0) * 1),
        "out of range": snapshot_chunk.encode(0, outside, []),
        "unpacks to more": good[:1] + b"\x01" + good[2:6] + b"\x01\0\0\0" + b"\0" + planes,
    }


@pytest.mark.parametrize("name", [name for name in bad_chunks() if name != "too many streams"])
def test_bad_chunks_are_refused_and_change_nothing(name: str) -> None:
    replica = new_replica(terms())
    before = replica.state()
    with pytest.raises(Refused):
        replica.load_chunk(0, bad_chunks()[name])
    assert replica.state() == before


def test_a_chunk_with_more_streams_than_the_run_allows_is_refused() -> None:
    replica = Replica(LAYOUT, terms().codec, max_streams=2)
    before = replica.state()
    with pytest.raises(Refused) as caught:
        replica.load_chunk(0, bad_chunks()["too many streams"])
    assert caught.value.code == "too-many-streams" and replica.state() == before


def test_a_stream_too_many_is_refused_and_changes_nothing() -> None:
    replica = Replica(LAYOUT, terms().codec, max_streams=1)
    assert replica.apply(ALL[0])
    before = replica.state()
    with pytest.raises(Refused) as caught:
        replica.apply(next(p for p in ALL if p.stream_key != ALL[0].stream_key))
    assert caught.value.code == "too-many-streams" and replica.state() == before


def test_what_another_thread_reads_is_of_one_moment() -> None:
    """A reader beside the applying thread: each chunk it gets holds exactly the packets that its entries name; states are pairs."""
    replica = new_replica(terms())
    index = 0
    done = threading.Event()
    chunks: list[bytes] = []
    states: set[tuple[bytes, bytes]] = set()

    def read() -> None:
        while not done.is_set():
            chunks.append(replica.read_chunk(index))
            states.add(replica.state())

    reader = threading.Thread(target=read)
    reader.start()
    for packet in ALL:
        replica.apply(packet)
    done.set()
    reader.join()
    assert chunks and len({digest for digest, _ in states}) == len(states)
    for data in set(chunks):
        values, entries = snapshot_chunk.decode(data, index, LAYOUT.chunks[index].size, torch.int32, 10)
        named = {(e.stream_key, seq) for e in entries for first, last in e.seqs for seq in range(first, last + 1)}
        held = [packet for packet in ALL if packet.chunk == index and (packet.stream_key, packet.seq) in named]
        assert torch.equal(values.to(torch.int64), LAYOUT.chunks[index].of(independent_sum(held)))


# -- several packets at once, and the state of a moment --------------------------------------------------------------------


def test_packets_of_one_chunk_at_once_are_as_one_after_the_other() -> None:
    at_once, in_turn = new_replica(terms()), new_replica(terms())
    for chunk in LAYOUT.chunks:
        listed = [packet for packet in ALL if packet.chunk == chunk.index]
        listed.insert(3, listed[0])
        outcomes = at_once.apply_all(listed)
        assert outcomes == [in_turn.apply(packet) for packet in listed] and outcomes.count(False) == 1
    assert at_once.state() == in_turn.state() and at_once._bounds == in_turn._bounds


def test_of_packets_at_once_only_those_that_leave_the_range_are_refused() -> None:
    """The exact check of a later packet sees the earlier ones of the same batch."""
    listed = [packet for packet in ALL if packet.chunk == 0]
    moved = torch.zeros(LAYOUT.chunks[0].size, dtype=torch.int32)
    for packet in listed[:2]:
        packet.delta.add_to(moved)
    at = int(moved.abs().argmax())
    replica = new_replica(terms())
    values = replica.basepoint.clone()
    values[at] = limits.basepoint_range - int(moved[at]) if moved[at] > 0 else -limits.basepoint_range - int(moved[at])
    replica.restore(values, replica.applied)
    one_by_one = new_replica(terms())
    one_by_one.restore(values, one_by_one.applied)
    expected: list[object] = []
    for packet in listed:
        try:
            expected.append(one_by_one.apply(packet))
        except Refused as refusal:
            expected.append(refusal.code)
    outcomes = [outcome.code if isinstance(outcome, Refused) else outcome for outcome in replica.apply_all(listed)]
    assert outcomes == expected and outcomes[:2] == [True, True]
    assert replica.state() == one_by_one.state()


@pytest.mark.parametrize("codec", ["sign", "topk-sign", "topk-2bit", "int8", "exact"])
def test_deltas_of_every_kind_at_once_are_as_one_after_the_other(codec: str) -> None:
    t = terms(codec)
    for chunk in LAYOUT.chunks:
        deltas = [t.codec.open(payload_for(chunk.index, seed=seed, t=t), chunk) for seed in range(4)]
        at_once, in_turn = torch.full((chunk.size,), 7, dtype=torch.int32), torch.full((chunk.size,), 7, dtype=torch.int32)
        add_all(deltas, at_once)
        for delta in deltas:
            delta.add_to(in_turn)
        assert torch.equal(at_once, in_turn) and int((at_once - 7).abs().max()) > 0


def test_a_kind_of_delta_that_adds_many_at_once_is_asked_to() -> None:
    added: list[int] = []

    class Many:
        largest_step = 1

        def add_to(self, basepoint: torch.Tensor, sign: int = 1) -> None:
            added.append(1)

        @staticmethod
        def add_many(deltas: list[Many], basepoint: torch.Tensor) -> None:
            added.append(len(deltas))

    values = torch.zeros(8, dtype=torch.int32)
    for deltas in ([Many(), Many(), Many()], [Many()], [Many(), ALL[0].delta]):
        add_all(deltas, torch.zeros(LAYOUT.chunks[0].size, dtype=torch.int32) if len(deltas) == 2 else values)  # type: ignore[arg-type]
    assert added == [3, 1, 1]


def test_the_state_of_a_moment_is_read_while_packets_go_on_being_applied() -> None:
    replica, still = new_replica(terms()), new_replica(terms())
    for packet in ALL[:6]:
        replica.apply(packet)
        still.apply(packet)
    replica.chunk_hash(0)  # one is known already
    reading = replica.begin_reading()
    for packet in ALL[6:]:
        replica.apply(packet)
    assert replica.read_state(reading) == still.state()
    now = replica.state()
    assert now != still.state() and list(replica.recent) == [still.state(), now]
    parts = [blake3(chunk.of(replica.basepoint).numpy().astype("<i4").tobytes()).digest() for chunk in LAYOUT.chunks]
    assert now[1] == blake3(b"".join(parts)).digest(), "no hash of the earlier moment was kept for a chunk that had changed"


def test_a_moment_that_takes_too_many_copies_is_given_up_and_the_next_one_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    replica, straight = new_replica(terms()), new_replica(terms())
    monkeypatch.setattr(limits, "reading_copies_bytes", 4 * LAYOUT.chunks[0].size)
    reading = replica.begin_reading()
    for packet in ALL:
        replica.apply(packet)
        straight.apply(packet)
    assert replica.read_state(reading) is None and not replica.recent
    assert replica.state() == straight.state() and replica._readings == []


def test_a_moment_ends_when_everything_is_replaced() -> None:
    replica = new_replica(terms())
    reading = replica.begin_reading()
    replica.set_start(start_weights(seed=5))
    assert replica.read_state(reading) is None
