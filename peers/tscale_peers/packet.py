"""The delta packet: one author's signed word about one chunk.

Enters: header fields and a payload, or bytes from anywhere. Leaves: bytes to spread, or a packet of which everything was checked.
Wire: u16 header length (little-endian) | header (MessagePack array) | payload | 64-byte Ed25519 signature over BLAKE3(header | payload).
The key (stream, seq, chunk) names a packet for ever. A stream is one author's home directory: a home that was lost starts a new stream, so
one key never has two contents unless the author lies; then two replicas with equal applied digests differ in hash, which both can see.
Nothing of a packet is believed before all of it was checked: sizes follow from layout and codec, never from the packet.

Two kinds more have the same form (owners.py). A contribution is addressed to the owner of its chunk and signed with a domain of its own: it
is no packet and is applied by nobody. A sum is the packet in which an owner publishes contributions: its header lists them, its stream is
the author's with the highest bit set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
from blake3 import blake3

from tscale_net.errors import Refused
from tscale_peers import included, limits
from tscale_peers.codec import Codec, Delta
from tscale_peers.errors import refuse
from tscale_peers.layout import Chunk, Layout

DOMAIN = b"tscale-fed/packet/1"
CONTRIBUTION_DOMAIN = b"tscale-fed/contribution/1"
PACKET_VERSION = 2
SUM_STREAM = 1 << 63
"""Set in the stream number of sums."""
SIGNATURE_BYTES = 64
KEY_BYTES = 32
_LENGTH_BYTES = 2
_HEADER_MAX_BYTES = limits.packet_header_max_bytes + limits.included_max_bytes

Key = tuple[bytes, int, int]
"""(stream key, seq, chunk) of one packet."""
Sign = Callable[[bytes, bytes], bytes]
"""(domain, message) -> 64-byte Ed25519 signature."""
Verify = Callable[[bytes, bytes, bytes, bytes], bool]
"""(public key, domain, message, signature) -> authentic?"""


def stream_key(author: bytes, stream: int) -> bytes:
    """40 bytes that name one author stream: public key, then the stream number, little-endian."""
    return author + stream.to_bytes(8, "little")


@dataclass(frozen=True)
class Terms:
    """What every packet of a run must satisfy; all of it follows from the manifest."""

    run: bytes
    layout: Layout
    codec: Codec
    """Of tensor classes that `codec_for` does not name."""
    max_coefficient: float = 1.0
    codec_for: Mapping[str, Codec] = field(default_factory=dict)
    """By tensor class. The layout cuts where the codec changes, so a chunk has one."""
    sum_codec: Codec | None = None
    """Instead of `codec` in owners' sums. Many sparse contributions make a denser sum, which is worth more bytes."""

    def codec_of(self, chunk: Chunk, is_sum: bool = False) -> Codec:
        """The codec of every packet for a chunk: of an author, or an owner's sum."""
        tensor = self.layout.specs[chunk.segments[0].tensor]
        plain = self.sum_codec if is_sum and self.sum_codec is not None else self.codec
        return self.codec_for.get(tensor.tensor_class, plain)

    def packet_bytes(self, chunk: Chunk) -> int:
        """Largest packet for a chunk."""
        most = max(self.codec_of(chunk, is_sum).max_payload_bytes(chunk) for is_sum in (False, True))
        return _LENGTH_BYTES + _HEADER_MAX_BYTES + most + SIGNATURE_BYTES

    @property
    def max_packet_bytes(self) -> int:
        """Largest packet of the run: the bound for a frame before anything is read."""
        return max(self.packet_bytes(chunk) for chunk in self.layout.chunks)


class Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Everything but the payload."""

    version: int
    run: bytes
    author: bytes
    stream: int
    seq: int
    """From 1, without gaps per stream and chunk."""
    chunk: int
    batches_total: int
    """Batches that the author had trained in this stream when it made the packet."""
    coefficient: float
    """c, already contained in the payload's steps; stated so that receivers can check it against the run's limit."""
    codec: str
    created_unix: float
    included: bytes = b""
    """Of a sum: the contributions in it (included.py). Otherwise empty."""
    owner: bytes = b""
    """Of a contribution: public key of the owner that it is for. Otherwise empty."""


_header_decoder = msgspec.msgpack.Decoder(Header)
_header_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class Packet:
    """A checked packet. `delta` is its decoded payload."""

    header: Header
    delta: Delta

    @property
    def stream_key(self) -> bytes:
        return stream_key(self.header.author, self.header.stream)

    @property
    def seq(self) -> int:
        return self.header.seq

    @property
    def chunk(self) -> int:
        return self.header.chunk

    @property
    def key(self) -> Key:
        return (self.stream_key, self.header.seq, self.header.chunk)

    @staticmethod
    def seal(header: Header, payload: bytes, sign: Sign) -> bytes:
        """Signed wire form. The caller vouches for header and payload; `decode` checks them all the same."""
        head = _header_encoder.encode(header)
        signature = sign(_domain(header), _message(head, payload))
        return b"".join((len(head).to_bytes(_LENGTH_BYTES, "little"), head, payload, signature))

    @staticmethod
    def decode(data: bytes, terms: Terms) -> Packet:
        """Everything but the signature, for bytes whose signature was checked before (the own log).

        Raises Refused: "packet-truncated", "packet-oversized", "packet-malformed", "packet-version", "wrong-run", "packet-codec",
        "packet-chunk", "packet-seq", "packet-coefficient", "packet-scale", "packet-payload", "bad-included".
        """
        packet = _decode(data, terms)
        if packet.header.owner:
            raise refuse("packet-malformed", "a contribution to an owner where a packet for everybody belongs")
        return packet

    @staticmethod
    def open(data: bytes, terms: Terms, verify: Verify) -> Packet:
        """`decode`, then the signature, which is dearest: Refused("bad-signature")."""
        packet = Packet.decode(data, terms)
        _check_signature(data, packet, verify)
        return packet

    @staticmethod
    def decode_contribution(data: bytes, terms: Terms) -> Packet:
        """As `decode`, for what is addressed to an owner."""
        packet = _decode(data, terms)
        if not packet.header.owner:
            raise refuse("packet-malformed", "a packet for everybody where a contribution to an owner belongs")
        return packet

    @staticmethod
    def open_contribution(data: bytes, terms: Terms, verify: Verify) -> Packet:
        """As `open`, for what is addressed to an owner. Whether that is this peer is for the caller to see."""
        packet = Packet.decode_contribution(data, terms)
        _check_signature(data, packet, verify)
        return packet

    @staticmethod
    def peek_key(data: bytes) -> Key | None:
        """The key that the bytes claim, unchecked; None if there is none to read."""
        try:
            header = _read_header(_split(data)[0])
        except Refused:
            return None
        return (stream_key(header.author, header.stream), header.seq, header.chunk)


def _decode(data: bytes, terms: Terms) -> Packet:
    head, payload, _ = _split(data)
    header = _read_header(head)
    _check_header(header, terms)
    chunk = terms.layout.chunks[header.chunk]
    return Packet(header, terms.codec_of(chunk, _is_sum(header)).open(payload, chunk))


def _is_sum(header: Header) -> bool:
    return header.stream >= SUM_STREAM


def _check_signature(data: bytes, packet: Packet, verify: Verify) -> None:
    head, payload, signature = _split(data)
    if not verify(packet.header.author, _domain(packet.header), _message(head, payload), signature):
        raise refuse("bad-signature", f"packet {packet.seq} for chunk {packet.chunk} was changed on its way or forged")


def _domain(header: Header) -> bytes:
    return CONTRIBUTION_DOMAIN if header.owner else DOMAIN


def _message(head: bytes, payload: bytes) -> bytes:
    hasher = blake3(head)
    hasher.update(payload)
    return hasher.digest()


def _split(data: bytes) -> tuple[bytes, bytes, bytes]:
    """(header, payload, signature) of a packet's bytes."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if length > _HEADER_MAX_BYTES:
        raise refuse("packet-malformed", f"a packet header of {length} bytes, the limit is {_HEADER_MAX_BYTES}")
    end = _LENGTH_BYTES + length
    if len(data) < end + SIGNATURE_BYTES or length == 0:
        raise refuse("packet-truncated", f"a packet of {len(data)} bytes ends before its header and signature do")
    return data[_LENGTH_BYTES:end], data[end:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]


def _read_header(head: bytes) -> Header:
    try:
        header = _header_decoder.decode(head)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise refuse("packet-malformed", f"a packet header that cannot be read: {error}") from None
    if header.version != PACKET_VERSION:
        raise refuse("packet-version", f"packet format {header.version}; this program speaks {PACKET_VERSION}: update the older side")
    if _header_encoder.encode(header) != head:
        raise refuse("packet-malformed", "a packet header that is not in canonical form")
    if len(head) - len(header.included) > limits.packet_header_max_bytes:
        raise refuse("packet-malformed", f"a packet header of {len(head)} bytes, the limit is {limits.packet_header_max_bytes}")
    for name, value, most in _unsigned(header):
        if not 0 <= value <= most:
            raise refuse("packet-malformed", f"a packet header whose {name} is {value}")
    if len(header.author) != KEY_BYTES:
        raise refuse("packet-malformed", f"an author key of {len(header.author)} bytes")
    return header


def _unsigned(header: Header) -> tuple[tuple[str, int, int], ...]:
    return (
        ("version", header.version, 255),
        ("stream", header.stream, (1 << 64) - 1),
        ("seq", header.seq, (1 << 64) - 1),
        ("chunk", header.chunk, (1 << 32) - 1),
        ("batches_total", header.batches_total, (1 << 64) - 1),
    )


def _check_header(header: Header, terms: Terms) -> None:
    if header.run != terms.run:
        raise refuse("wrong-run", f"a packet of run {header.run[:4].hex()}, not of {terms.run[:4].hex()}")
    if header.chunk >= len(terms.layout.chunks):
        raise refuse("packet-chunk", f"a packet for chunk {header.chunk}; the run has {len(terms.layout.chunks)} chunks")
    codec = terms.codec_of(terms.layout.chunks[header.chunk], _is_sum(header))
    if header.codec != codec.name:
        raise refuse("packet-codec", f"a packet with codec {header.codec[:32]!r}; the run uses {codec.name!r} for chunk {header.chunk}")
    if not 1 <= header.seq <= limits.applied_seq_max or header.batches_total > limits.applied_seq_max:
        raise refuse("packet-seq", f"packet number {header.seq} (from 1) and batch count {header.batches_total} must fit 63 bits")
    if not (math.isfinite(header.coefficient) and 0 < header.coefficient <= terms.max_coefficient):
        raise refuse("packet-coefficient", f"coefficient {header.coefficient}; the run allows above 0 and up to {terms.max_coefficient}")
    if not math.isfinite(header.created_unix):
        raise refuse("packet-malformed", "a packet header whose creation time is not a number")
    _check_kind(header)


def _check_kind(header: Header) -> None:
    """A packet, a sum or a contribution: nothing in between."""
    is_sum = _is_sum(header)
    if header.owner:
        if len(header.owner) != KEY_BYTES or is_sum or header.included or header.seq > included.LAST_NUMBER:
            raise refuse("packet-malformed", "a contribution with a field that does not belong to one")
    elif is_sum != bool(header.included):
        raise refuse("packet-malformed", "a sum that lists no contributions, or a packet that does")
    elif is_sum:
        included.decode(header.included)
