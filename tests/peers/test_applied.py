"""The applied set against a plain model (a Python set of keys), its digest, its strict wire form."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tscale_net.errors import Refused
from tscale_peers import limits, ranges
from tscale_peers.applied import AppliedSet, ChunkEntry
from tscale_peers.applied_wire import decode_entries, encode_entries, varint

CHUNKS = 3
STREAMS = [bytes([i]) * 40 for i in (1, 2, 3)]

keys = st.tuples(st.sampled_from(STREAMS), st.integers(1, 12), st.integers(0, CHUNKS - 1))
key_lists = st.lists(keys, max_size=60)


def set_of(listed: list[tuple[bytes, int, int]]) -> AppliedSet:
    applied = AppliedSet(CHUNKS)
    for key in listed:
        applied.add(*key)
    return applied


@given(key_lists)
def test_it_holds_what_was_added_and_nothing_else(listed: list[tuple[bytes, int, int]]) -> None:
    applied, model = AppliedSet(CHUNKS), set()
    for key in listed:
        assert applied.can_add(*key) == (key not in model)
        assert applied.add(*key) == (key not in model)
        model.add(key)
    for stream in STREAMS:
        for chunk in range(CHUNKS):
            mine = {seq for s, seq, c in model if (s, c) == (stream, chunk)}
            assert {seq for seq in range(15) if applied.contains(stream, seq, chunk)} == mine
            assert applied.highest(stream, chunk) == max(mine, default=0)
            assert ranges.canonical(applied.seqs(stream, chunk))


@given(key_lists, st.randoms(use_true_random=False), key_lists)
def test_digests_are_equal_exactly_for_equal_sets(listed: list[tuple[bytes, int, int]], rng, others: list[tuple[bytes, int, int]]) -> None:
    shuffled = [*listed, *listed[: len(listed) // 2]]
    rng.shuffle(shuffled)
    one, two, third = set_of(listed), set_of(shuffled), set_of(others)
    assert one.digest() == two.digest() and one == two
    assert all(one.chunk_digest(c) == two.chunk_digest(c) for c in range(CHUNKS))
    assert (one.digest() == third.digest()) == (set(listed) == set(others))
    for c in range(CHUNKS):
        part = [{key for key in keys if key[2] == c} for keys in (listed, others)]
        assert (one.chunk_digest(c) == third.chunk_digest(c)) == (part[0] == part[1])


@given(key_lists)
def test_the_kept_digest_is_the_one_computed_anew(listed: list[tuple[bytes, int, int]]) -> None:
    applied = AppliedSet(CHUNKS)
    for key in listed:
        applied.add(*key)
        applied.digest()
    assert applied.digest() == set_of(sorted(listed)).digest()


@given(key_lists, key_lists)
def test_what_is_missing(mine: list[tuple[bytes, int, int]], theirs: list[tuple[bytes, int, int]]) -> None:
    one, two = set_of(mine), set_of(theirs)
    missing = list(one.missing_from(two))
    found = {(stream, seq, chunk) for stream, chunk, first, last in missing for seq in range(first, last + 1)}
    assert found == set(theirs) - set(mine)
    assert missing == sorted(missing)
    for key in found:
        one.add(*key)
    assert not list(one.missing_from(two))


@given(key_lists, key_lists)
def test_range_subtraction(mine: list[tuple[bytes, int, int]], theirs: list[tuple[bytes, int, int]]) -> None:
    one, two = set_of(mine).seqs(STREAMS[0], 0), set_of(theirs).seqs(STREAMS[0], 0)
    left = ranges.subtract(one, two)
    assert ranges.canonical(left)
    values = [{v for first, last in pairs for v in range(first, last + 1)} for pairs in (one, two, left)]
    assert values[2] == values[0] - values[1]


@given(key_lists)
def test_wire_round_trip(listed: list[tuple[bytes, int, int]]) -> None:
    applied = set_of(listed)
    for stream in STREAMS:
        applied.note_batches(stream, 17)
    data = applied.encode()
    back = AppliedSet.decode(data, CHUNKS)
    assert back == applied and back.encode() == data and back.batches == applied.batches
    assert applied.total_batches() == 17 * len(applied)


@settings(max_examples=300, deadline=None)
@given(key_lists, st.data())
def test_changed_bytes_are_refused_or_mean_another_set_in_canonical_form(listed: list[tuple[bytes, int, int]], data: st.DataObject) -> None:
    wire = bytearray(set_of(listed).encode())
    at = data.draw(st.integers(0, len(wire) - 1))
    wire[at] = data.draw(st.integers(0, 255))
    try:
        back = AppliedSet.decode(bytes(wire), CHUNKS)
    except Refused as refusal:
        assert refusal.code in ("bad-applied-set", "too-many-streams")
    else:
        assert back.encode() == bytes(wire)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(Refused):
        AppliedSet.decode(noise + b"\xff", CHUNKS)


def test_truncated_and_longer_bytes_are_refused() -> None:
    data = set_of([(STREAMS[0], 1, 0), (STREAMS[0], 4, 2), (STREAMS[1], 2, 1)]).encode()
    for length in range(len(data)):
        with pytest.raises(Refused):
            AppliedSet.decode(data[:length], CHUNKS)
    with pytest.raises(Refused, match="follow its end"):
        AppliedSet.decode(data + b"\0", CHUNKS)


def test_other_versions_chunks_kinds_and_too_many_streams_are_refused() -> None:
    data = bytearray(set_of([(STREAMS[0], 1, 0), (STREAMS[1], 1, 0)]).encode())
    with pytest.raises(Refused, match="chunks"):
        AppliedSet.decode(bytes(data), CHUNKS + 1)
    with pytest.raises(Refused) as caught:
        AppliedSet.decode(bytes(data), CHUNKS, max_streams=1)
    assert caught.value.code == "too-many-streams"
    with pytest.raises(Refused, match="version"):
        AppliedSet.decode(b"\x09" + bytes(data[1:]), CHUNKS)
    data[3] = 1
    with pytest.raises(Refused, match="kind 1"):
        AppliedSet.decode(bytes(data), CHUNKS)


def test_a_set_in_step_is_small_whatever_the_number_of_chunks() -> None:
    applied = AppliedSet(1500)
    for chunk in range(1500):
        for seq in (1, 2, 3):
            applied.add(STREAMS[0], seq, chunk)
    assert len(applied.encode()) < 64


def test_an_author_cannot_grow_a_set_by_leaving_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "applied_ranges_per_chunk", 4)
    applied = set_of([(STREAMS[0], seq, 0) for seq in (3, 5, 7, 9)])
    before = applied.digest()
    for call in (applied.add, applied.can_add):
        with pytest.raises(Refused) as caught:
            call(STREAMS[0], 11, 0)
        assert caught.value.code == "too-many-gaps"
    assert applied.digest() == before
    assert applied.add(STREAMS[0], 1, 0) and applied.add(STREAMS[0], 2, 0)
    assert applied.seqs(STREAMS[0], 0) == [(1, 3), (5, 5), (7, 7), (9, 9)]
    assert applied.add(STREAMS[0], 11, 0)


def test_more_streams_than_allowed_are_refused() -> None:
    applied = AppliedSet(CHUNKS, max_streams=2)
    applied.add(STREAMS[0], 1, 0)
    applied.add(STREAMS[1], 1, 0)
    with pytest.raises(Refused) as caught:
        applied.add(STREAMS[2], 1, 0)
    assert caught.value.code == "too-many-streams" and len(applied) == 2


@pytest.mark.parametrize(
    "key", [(b"short", 1, 0), (STREAMS[0], 0, 0), (STREAMS[0], 1, CHUNKS), (STREAMS[0], 1, -1), (STREAMS[0], 1 << 63, 0)]
)
def test_keys_that_no_packet_has_are_a_bug_of_the_caller(key: tuple[bytes, int, int]) -> None:
    with pytest.raises(ValueError, match="not a packet key"):
        AppliedSet(CHUNKS).add(*key)


@given(key_lists, key_lists, st.integers(0, CHUNKS - 1))
def test_replacing_a_chunk_takes_the_donors_part_and_leaves_the_rest(
    mine: list[tuple[bytes, int, int]], theirs: list[tuple[bytes, int, int]], chunk: int
) -> None:
    one, two = set_of(mine), set_of(theirs)
    one.digest()
    one.replace_chunk(chunk, decode_entries(encode_entries(two.chunk_entries(chunk)), 10))
    assert one.digest() == set_of([k for k in mine if k[2] != chunk] + [k for k in theirs if k[2] == chunk]).digest()


def test_entries_are_read_strictly() -> None:
    entries = [ChunkEntry(STREAMS[0], 5, ((1, 3), (9, 9))), ChunkEntry(STREAMS[1], 0, ((2, 2),))]
    data = encode_entries(entries)
    assert decode_entries(data, 2) == entries
    for wrong in (data[:-1], data + b"\0", encode_entries(entries[::-1]), encode_entries([ChunkEntry(STREAMS[0], 1, ())])):
        with pytest.raises(Refused):
            decode_entries(wrong, 2)
    with pytest.raises(Refused) as caught:
        decode_entries(data, 1)
    assert caught.value.code == "too-many-streams"


@given(st.integers(0, limits.applied_seq_max))
def test_varints_are_short(value: int) -> None:
    assert len(varint(value)) == max(1, -(-value.bit_length() // 7))


def test_copies_are_independent() -> None:
    one = set_of([(STREAMS[0], 1, 0), (STREAMS[1], 5, 0)])
    two, only = one.copy(), one.only(STREAMS[1])
    one.add(STREAMS[1], 6, 0)
    assert two != one and two.digest() == set_of([(STREAMS[0], 1, 0), (STREAMS[1], 5, 0)]).digest()
    assert only.digest() == set_of([(STREAMS[1], 5, 0)]).digest()
