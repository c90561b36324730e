"""The packet: round trip; every mutated, truncated, oversized or lying one is refused with its code, and no replica changes."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.peers.core_kit import LAYOUT, author, header, key_of, new_replica, payload_for, sealed, terms
from tscale_net.errors import Refused
from tscale_net.identity import verify
from tscale_peers import included, limits
from tscale_peers.errors import REASONS
from tscale_peers.packet import SUM_STREAM, Packet

GOOD = sealed(payload_for(0))
LISTED = included.encode({b"somebody": [(3, 4)]})


def refusal_of(data: bytes) -> str:
    """The code with which a receiver turns `data` away; proves that its replica stays as it is."""
    replica = new_replica(terms())
    before = replica.state()
    with pytest.raises(Refused) as caught:
        replica.apply(Packet.open(data, terms(), verify))
    assert replica.state() == before
    assert caught.value.code in REASONS
    return caught.value.code


@pytest.mark.parametrize("chunk", range(len(LAYOUT.chunks)))
def test_round_trip(chunk: int) -> None:
    data = sealed(payload_for(chunk), chunk=chunk, seq=9, batches_total=44)
    packet = Packet.open(data, terms(), verify)
    assert packet.header == header(chunk=chunk, seq=9, batches_total=44)
    assert packet.key == (key_of(1), 9, chunk) == Packet.peek_key(data)
    assert Packet.seal(packet.header, payload_for(chunk), author(1).sign) == data
    assert len(data) <= terms().packet_bytes(LAYOUT.chunks[chunk]) <= terms().max_packet_bytes


def test_every_flipped_bit_is_refused() -> None:
    replica = new_replica(terms())
    before = replica.state()
    for at in range(len(GOOD)):
        mutant = bytearray(GOOD)
        mutant[at] ^= 1 << (at % 8)
        with pytest.raises(Refused) as caught:
            replica.apply(Packet.open(bytes(mutant), terms(), verify))
        assert caught.value.code in REASONS
    assert replica.state() == before


def test_every_truncation_is_refused() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(Refused):
            Packet.open(GOOD[:length], terms(), verify)


@pytest.mark.parametrize("more", [1, 64, 4096])
def test_longer_packets_are_refused(more: int) -> None:
    assert refusal_of(GOOD + b"\0" * more) == "packet-oversized"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"version": 1}, "packet-version"),
        ({"version": 3}, "packet-version"),
        ({"run": b"x" * 32}, "wrong-run"),
        ({"codec": "exact"}, "packet-codec"),
        ({"codec": "x" * 100}, "packet-codec"),
        ({"chunk": len(LAYOUT.chunks)}, "packet-chunk"),
        ({"chunk": 1 << 32}, "packet-malformed"),
        ({"chunk": -1}, "packet-malformed"),
        ({"seq": 0}, "packet-seq"),
        ({"seq": 1 << 63}, "packet-seq"),
        ({"seq": -1}, "packet-malformed"),
        ({"batches_total": 1 << 63}, "packet-seq"),
        ({"batches_total": -5}, "packet-malformed"),
        ({"coefficient": math.nan}, "packet-coefficient"),
        ({"coefficient": math.inf}, "packet-coefficient"),
        ({"coefficient": 0.0}, "packet-coefficient"),
        ({"coefficient": -0.5}, "packet-coefficient"),
        ({"coefficient": 1.0001}, "packet-coefficient"),
        ({"created_unix": math.nan}, "packet-malformed"),
        ({"author": b"short"}, "packet-malformed"),
        ({"author": author(2).public_key}, "bad-signature"),
        ({"author": bytes(32)}, "bad-signature"),
        ({"codec": "x" * 300}, "packet-malformed"),
        ({"owner": author(2).public_key}, "packet-malformed"),
        ({"stream": SUM_STREAM}, "packet-malformed"),
        ({"included": LISTED}, "packet-malformed"),
        ({"stream": SUM_STREAM, "included": LISTED[:-1]}, "bad-included"),
        ({"stream": SUM_STREAM, "included": LISTED[:-2] + bytes(2)}, "bad-included"),
        ({"stream": SUM_STREAM, "included": LISTED * 2}, "bad-included"),
        ({"stream": SUM_STREAM, "included": LISTED * (limits.included_entries + 1)}, "bad-included"),
    ],
)
def test_lying_headers_signed_by_their_author_are_refused(changes: dict[str, object], code: str) -> None:
    assert refusal_of(sealed(payload_for(0), **changes)) == code


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", "packet-truncated"),
        (payload_for(0)[:-1], "packet-truncated"),
        (payload_for(0) + b"\0", "packet-oversized"),
        (b"\xff" * len(payload_for(0)), "packet-scale"),
    ],
)
def test_lying_payloads_signed_by_their_author_are_refused(payload: bytes, code: str) -> None:
    assert refusal_of(sealed(payload)) == code


def test_a_payload_for_another_chunk_is_refused_by_its_size() -> None:
    sizes = {terms().codec.max_payload_bytes(chunk) for chunk in LAYOUT.chunks}
    assert len(sizes) > 1
    assert refusal_of(sealed(payload_for(len(LAYOUT.chunks) - 1))) in ("packet-truncated", "packet-oversized")


def test_a_header_in_another_spelling_is_refused() -> None:
    """The same header with its first number spelt in two bytes, signed by the author."""
    length = int.from_bytes(GOOD[:2], "little")
    head = GOOD[2 : 2 + length]
    wider = head[:1] + b"\xcc" + head[1:]
    data = len(wider).to_bytes(2, "little") + wider + GOOD[2 + length :]
    assert refusal_of(data) == "packet-malformed"


def test_a_huge_header_length_is_refused_before_anything_is_read() -> None:
    assert refusal_of(b"\xff\xff" + GOOD[2:]) == "packet-malformed"
    assert limits.packet_header_max_bytes < 0xFFFF


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2000))
def test_noise_is_refused_and_has_no_key(noise: bytes) -> None:
    with pytest.raises(Refused):
        Packet.open(noise, terms(), verify)
    assert Packet.peek_key(noise) is None


def test_the_frame_bound_is_above_every_packet() -> None:
    most = included.encode({number.to_bytes(8, "big"): [(1 << 31, 1 << 31)] for number in range(limits.included_entries)})
    numbers = {"seq": limits.applied_seq_max, "batches_total": limits.applied_seq_max}
    longest = {**numbers, "stream": (1 << 64) - 1, "included": most}
    for chunk in LAYOUT.chunks:
        data = sealed(payload_for(chunk.index), chunk=chunk.index, **longest)
        assert len(data) <= terms().packet_bytes(chunk)
        Packet.open(data, terms(), verify)
