"""The frame of every message: a fixed 32-byte header and a body, sent as exactly two ZeroMQ parts.

Enters: kind, session, sequence and body; or what arrived from a peer. Leaves: the header bytes; or a checked `Header`.

    offset  size  field (little-endian)
    0       4     magic "TSF1"
    4       1     header version, 1
    5       1     kind
    6       2     flags, must be 0 (reserved)
    8       4     body length in bytes
    12      4     must be 0 (reserved)
    16      8     sequence: 0, 1, 2, ... on each connection and direction
    24      8     first 8 bytes of the session id; zeros before a session exists

Rule: whatever does not fit is refused with a code of its own before its body is looked at. The sequence finds losses: ZeroMQ promises none
within a connection, so a gap ends the session.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tscale_net import limits
from tscale_net.errors import Refused
from tscale_net.messages import TRANSFER_KINDS
from tscale_net.ports import APPLICATION_KINDS_START, Channel

MAGIC = b"TSF1"
HEADER_VERSION = 1
NO_SESSION = bytes(8)
_HEADER = struct.Struct("<4sBBHIIQ8s")
assert _HEADER.size == limits.HEADER_BYTES

_BODY_LIMIT = {Channel.CONTROL: limits.CONTROL_BODY_BYTES, Channel.BULK: limits.BULK_BODY_BYTES}


@dataclass(frozen=True, slots=True)
class Header:
    """A header that was checked against its body."""

    kind: int
    sequence: int
    session: bytes
    """8 bytes."""


def body_limit(channel: Channel) -> int:
    """Largest body in bytes on a channel."""
    return _BODY_LIMIT[channel]


def encode_header(kind: int, sequence: int, session: bytes, body_bytes: int) -> bytes:
    """The 32 header bytes. `session` is the session id or NO_SESSION; its first 8 bytes are used."""
    return _HEADER.pack(MAGIC, HEADER_VERSION, kind, 0, body_bytes, 0, sequence, session[:8])


def decode(parts: Sequence[bytes | memoryview], channel: Channel) -> tuple[Header, bytes]:
    """Check the parts of one message and return header and body.

    Raises Refused("bad-frame", "too-large" or "truncated"). The body is copied only after all checks.
    """
    if len(parts) != 2:
        raise Refused("bad-frame", f"A message has {len(parts)} parts instead of header and body.")
    header, body = parts
    if len(header) != limits.HEADER_BYTES:
        raise Refused("bad-frame", f"A header has {len(header)} bytes instead of {limits.HEADER_BYTES}.")
    magic, version, kind, flags, length, reserved, sequence, session = _HEADER.unpack(header)
    if magic != MAGIC or version != HEADER_VERSION:
        raise Refused("bad-frame", "A header has another magic or version; the sender does not speak tscale-fed/1.")
    if flags or reserved:
        raise Refused("bad-frame", "A header uses reserved fields; the sender is newer or broken.")
    if length > _BODY_LIMIT[channel] or len(body) > _BODY_LIMIT[channel]:
        size = max(length, len(body))
        raise Refused("too-large", f"A body of {size} bytes is over the {_BODY_LIMIT[channel]} of the {channel.name} channel.")
    if length != len(body):
        raise Refused("truncated", f"A header announces {length} bytes but {len(body)} came.")
    return Header(kind, sequence, session), bytes(body)


def check_outgoing(kind: int, body: bytes, channel: Channel) -> None:
    """Refuse what no transport may be asked to send: foreign kinds (ValueError) and bodies over the limit (Refused("too-large"))."""
    if kind not in TRANSFER_KINDS and not APPLICATION_KINDS_START <= kind <= 255:
        raise ValueError(f"kind {kind} is reserved; applications use {APPLICATION_KINDS_START} to 255")
    if len(body) > body_limit(channel):
        limit = body_limit(channel)
        raise Refused("too-large", f"A body of {len(body)} bytes is over the {limit} of the {channel.name} channel; send chunks.")
