"""What swarm peers say to each other, one typed struct per message, and its frame kind.

Enters: keys and sets to tell, or bytes of a neighbour. Leaves: bytes, or checked values. Fields are only ever appended.
Publications of many chunks are told as ranges of chunks, so a 1500-chunk publication is one range.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import msgspec

from tscale_net.errors import Refused
from tscale_peers import limits

RECORDS = 32
HAVE = 33
WANT = 34
PACKET = 35
MISSING = 36
SUMMARY = 37
SET_PART = 38
CONTRIBUTION = 39

GOSSIP_KINDS = frozenset({HAVE, WANT, MISSING, SUMMARY, SET_PART})

STREAM_KEY_BYTES = 40
"""Author's public key (32) and stream number (8)."""


class Range(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Packets of one stream and seq, chunks first..last inclusive."""

    stream: bytes
    seq: int
    first: int
    last: int


class Ranges(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Body of HAVE, WANT and MISSING."""

    ranges: list[Range]

    @staticmethod
    def of(keys: Iterable[tuple[bytes, int, int]]) -> Ranges:
        """Keys joined into ranges of neighbouring chunks."""
        ranges: list[Range] = []
        for stream, seq, chunk in sorted(keys):
            last = ranges[-1] if ranges else None
            if last is not None and last.stream == stream and last.seq == seq and chunk <= last.last + 1:
                ranges[-1] = Range(stream, seq, last.first, max(chunk, last.last))
            else:
                ranges.append(Range(stream, seq, chunk, chunk))
        return Ranges(ranges)

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @staticmethod
    def bodies(keys: Iterable[tuple[bytes, int, int]]) -> list[bytes]:
        """As many message bodies as it takes, none with more than `ranges_per_message` ranges. At most `keys_per_message` keys."""
        ranges, most = Ranges.of(keys).ranges, limits.ranges_per_message
        return [Ranges(ranges[at : at + most]).encode() for at in range(0, len(ranges), most)]


class Summary(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Digest of the packets that the sender knows; with `applied` the whole set. `reply` ends the exchange."""

    digest: bytes
    applied: bytes
    reply: bool = False


class SetPart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the sender knows of the streams whose keys lie in first <= key < end, where its whole set is too large for one message. An empty
    `end` means no end. `reply` ends the exchange."""

    first: bytes
    end: bytes
    applied: bytes
    reply: bool = False


class Records(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Signed peer records, own or relayed."""

    sealed: list[bytes]


T = TypeVar("T")
_ranges = msgspec.msgpack.Decoder(Ranges)
_summary = msgspec.msgpack.Decoder(Summary)
_set_part = msgspec.msgpack.Decoder(SetPart)
_records = msgspec.msgpack.Decoder(Records)


def decode_ranges(body: bytes, chunks: int) -> list[tuple[bytes, int, int]]:
    """The keys of a HAVE, WANT or MISSING. Raises Refused("bad-message")."""
    message = _decode(_ranges, body)
    keys: list[tuple[bytes, int, int]] = []
    for r in message.ranges:
        if len(r.stream) != STREAM_KEY_BYTES or not 1 <= r.seq < 1 << 63 or not 0 <= r.first <= r.last < chunks:
            raise Refused("bad-message", "a list of packets with a range outside the run")
        if len(keys) + r.last - r.first >= limits.keys_per_message:
            raise Refused("bad-message", f"a list of more than {limits.keys_per_message} packets")
        keys += [(r.stream, r.seq, chunk) for chunk in range(r.first, r.last + 1)]
    return keys


def decode_summary(body: bytes) -> Summary:
    """Raises Refused("bad-message")."""
    summary = _decode(_summary, body)
    if len(summary.digest) != 32:
        raise Refused("bad-message", "a summary whose digest is not 32 bytes")
    return summary


def decode_set_part(body: bytes) -> SetPart:
    """Raises Refused("bad-message")."""
    part = _decode(_set_part, body)
    if len(part.first) > STREAM_KEY_BYTES or len(part.end) > STREAM_KEY_BYTES or (part.end and part.end <= part.first):
        raise Refused("bad-message", "a part of a set whose bounds are not bounds")
    return part


def decode_records(body: bytes) -> list[bytes]:
    """Raises Refused("bad-message")."""
    sealed = _decode(_records, body).sealed
    if len(sealed) > limits.records_per_message:
        raise Refused("bad-message", f"more than {limits.records_per_message} records in one message")
    return sealed


def _decode(decoder: msgspec.msgpack.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise Refused("bad-message", f"a message that cannot be read: {error}") from None
