"""Frames and messages: what is well-formed passes unchanged, everything else is refused with a code, nothing crashes."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscale_net import frames, limits, messages
from tscale_net.errors import REASONS, Refused
from tscale_net.messages import Bye, HelloBody, Kind, Message, Ping
from tscale_net.ports import APPLICATION_KINDS_START, Channel

ALL_MESSAGES = sorted(messages._DECODERS, key=lambda message: message.__name__)


@given(
    st.integers(0, 255), st.integers(0, 2**64 - 1), st.binary(min_size=8, max_size=16), st.binary(max_size=300), st.sampled_from(Channel)
)
def test_frame_round_trip(kind: int, sequence: int, session: bytes, body: bytes, channel: Channel) -> None:
    header = frames.encode_header(kind, sequence, session, len(body))
    assert len(header) == limits.HEADER_BYTES
    assert frames.decode([header, body], channel) == (frames.Header(kind, sequence, session[:8]), body)


def refusal(parts: list[bytes], channel: Channel = Channel.CONTROL) -> str:
    with pytest.raises(Refused) as caught:
        frames.decode(parts, channel)
    assert caught.value.code in REASONS
    return caught.value.code


def test_malformed_frames_have_their_codes() -> None:
    good = frames.encode_header(40, 0, bytes(8), 3)
    assert refusal([]) == refusal([good]) == refusal([good, b"abc", b""]) == "bad-frame"
    assert refusal([good[:-1], b"abc"]) == refusal([good + b"\0", b"abc"]) == "bad-frame"
    for offset in (0, 4, 6, 7, 12, 15):
        broken = bytearray(good)
        broken[offset] ^= 1
        assert refusal([bytes(broken), b"abc"]) == "bad-frame"
    assert refusal([good, b"ab"]) == refusal([good, b"abcd"]) == "truncated"
    assert refusal([frames.encode_header(40, 0, bytes(8), 2**32 - 1), b""]) == "too-large"
    large = bytes(limits.CONTROL_BODY_BYTES + 1)
    assert refusal([frames.encode_header(40, 0, bytes(8), len(large)), large]) == "too-large"
    assert frames.decode([frames.encode_header(40, 0, bytes(8), len(large)), large], Channel.BULK)[1] == large


@given(st.lists(st.binary(max_size=80), max_size=4), st.sampled_from(Channel))
def test_garbage_frames_are_refused(parts: list[bytes], channel: Channel) -> None:
    assert refusal(parts, channel)


@given(st.binary(min_size=28, max_size=28), st.binary(max_size=40))
def test_almost_frames_are_refused_or_consistent(rest: bytes, body: bytes) -> None:
    try:
        _, read = frames.decode([frames.MAGIC + rest, body], Channel.BULK)
    except Refused as refused:
        assert refused.code in REASONS
    else:
        assert struct.unpack_from("<I", rest, 4)[0] == len(read)


@pytest.mark.parametrize("message", ALL_MESSAGES, ids=lambda message: message.__name__)
@given(data=st.binary(max_size=200))
def test_garbage_messages_are_refused(message: type[Message], data: bytes) -> None:
    try:
        messages.decode(message, data)
    except Refused as refused:
        assert refused.code == "bad-message"


_ATOMS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=40) | st.text(max_size=20)
_VALUES = st.recursive(_ATOMS, lambda inner: st.lists(inner, max_size=14), max_leaves=20)


@pytest.mark.parametrize("message", ALL_MESSAGES, ids=lambda message: message.__name__)
@given(value=_VALUES)
def test_well_formed_lies_are_refused_or_typed(message: type[Message], value: object) -> None:
    try:
        read = messages.decode(message, msgspec.msgpack.encode(value))
    except Refused as refused:
        assert refused.code == "bad-message"
    else:
        assert messages.decode(message, messages.encode(read)) == read


def test_length_lies_cost_nothing() -> None:
    nested = b"\x91" * 100_000
    huge_array, huge_bytes, huge_map = b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"
    for lie in (nested, huge_array, huge_bytes, huge_map, b"\x91" + huge_bytes):
        with pytest.raises(Refused):
            messages.decode(HelloBody, lie)


def test_trailing_bytes_and_extra_fields_are_refused() -> None:
    pack = msgspec.msgpack.encode
    for lie in (messages.encode(Ping(1)) + b"\0", pack([1, 2]), pack([]), pack({"number": 1})):
        with pytest.raises(Refused):
            messages.decode(Ping, lie)


def test_bye_is_cut_to_its_limits() -> None:
    bye = messages.bye_of("c" * 100, "d" * 10_000)
    assert messages.decode(Bye, messages.encode(bye)) == bye


def test_wire_messages_are_frozen() -> None:
    """Kinds, field order and types are what peers of other versions read: appending is allowed, anything else is a new protocol."""
    assert {kind.name: int(kind) for kind in Kind} == {
        "HELLO": 1, "BYE": 2, "PING": 3, "PONG": 4, "ATTACH": 5, "ATTACHED": 6, "BLOB_OPEN": 16, "BLOB_OPENED": 17, "BLOB_FAILED": 18,
        "BLOB_HASHES_WANTED": 19, "BLOB_HASHES": 20, "BLOB_WANTED": 21, "BLOB_CHUNK": 22, "BLOB_CLOSE": 23,
    }  # fmt: skip
    assert {message.__name__: message.__struct_fields__ for message in ALL_MESSAGES} == {
        "Attach": ("session",),
        "BlobClose": ("transfer",),
        "BlobFailed": ("transfer", "code", "detail"),
        "BlobHashes": ("transfer", "first", "hashes"),
        "BlobHashesWanted": ("transfer", "first"),
        "BlobOpen": ("transfer", "name"),
        "BlobOpened": ("transfer", "size", "root"),
        "BlobWanted": ("transfer", "chunks"),
        "Bye": ("code", "detail"),
        "DoorBody": ("public_key", "nonce", "unix_ms", "protocol_min", "protocol_max", "run", "name", "link_port", "observed"),
        "DoorHead": ("public_key", "nonce", "unix_ms", "protocol_min", "protocol_max"),
        "DoorReply": ("body", "signature"),
        "DoorRequest": ("protocol_min", "protocol_max", "nonce"),
        "Hello": ("body", "signature"),
        "HelloHead": ("protocol_min", "protocol_max"),
        "HelloBody": (
            "protocol_min", "protocol_max", "public_key", "destination", "nonce", "unix_ms", "reply_to", "instance", "order", "session",
            "run", "name", "addresses",
        ),
        "Ping": ("number",),
    }  # fmt: skip
    ping = frames.encode_header(Kind.PING, 7, b"sessionsession", 2) + messages.encode(Ping(5))
    assert ping.hex() == "54534631" "01" "03" "0000" "02000000" "00000000" "0700000000000000" "73657373696f6e73" "9105"
    assert all(kind < APPLICATION_KINDS_START for kind in Kind)
