"""One typed struct per message of this room, with one strict decoder each.

Enters: bytes of a peer. Leaves: a struct whose fields all have the right type and length, or Refused("bad-message").
Rule: fields are positional and unknown ones are refused, so every change of a struct is a new protocol version. What a newer program may
send before versions are compared (HELLO, the hello door) is therefore read twice: first only its head, whose form never changes.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Any, TypeVar

import msgspec

from tscale_net import limits
from tscale_net.errors import Refused

HELLO_DOMAIN = b"tscale-fed/hello/1"
DOOR_DOMAIN = b"tscale-fed/door/1"

Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=limits.NONCE_BYTES, max_length=limits.NONCE_BYTES)]
MaybeNonce = Annotated[bytes, msgspec.Meta(max_length=limits.NONCE_BYTES)]
Run = Annotated[bytes, msgspec.Meta(max_length=limits.RUN_BYTES)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Name = Annotated[str, msgspec.Meta(max_length=limits.NAME_CHARACTERS)]
Reason = Annotated[str, msgspec.Meta(max_length=limits.REASON_CHARACTERS)]
BlobName = Annotated[str, msgspec.Meta(min_length=1, max_length=limits.BLOB_NAME_CHARACTERS)]
AddressText = Annotated[str, msgspec.Meta(max_length=limits.ADDRESS_CHARACTERS)]
AddressList = Annotated[list[AddressText], msgspec.Meta(max_length=limits.ADDRESSES_PER_PEER)]


class Kind(IntEnum):
    """Frame kinds of this room. 1 to 15 stay inside the transport; 16 to 31 are blob transfer and are passed on as frames."""

    HELLO = 1
    BYE = 2
    PING = 3
    PONG = 4
    ATTACH = 5
    ATTACHED = 6
    BLOB_OPEN = 16
    BLOB_OPENED = 17
    BLOB_FAILED = 18
    BLOB_HASHES_WANTED = 19
    BLOB_HASHES = 20
    BLOB_WANTED = 21
    BLOB_CHUNK = 22
    BLOB_CLOSE = 23


TRANSFER_KINDS = frozenset(kind for kind in Kind if kind >= Kind.BLOB_OPEN)


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages: positional, immutable, strict."""


class HelloHead(msgspec.Struct, frozen=True, array_like=True):
    """How every version of HelloBody and DoorRequest begins; fields after these are not looked at."""

    protocol_min: Count
    protocol_max: Count


class HelloBody(Message, frozen=True):
    """What a HELLO says; signed as the bytes that were sent."""

    protocol_min: Count
    protocol_max: Count
    public_key: Key
    destination: Key
    """Public key of the peer it is meant for."""
    nonce: Nonce
    unix_ms: Count
    reply_to: MaybeNonce
    """Nonce of the HELLO that this one answers; empty in the first one."""
    instance: Nonce
    """Drawn at each start of the program: tells a restarted peer from one that dials twice."""
    order: Count
    """Counts the HELLOs of this instance: tells which of two connections its maker opened later."""
    session: Nonce
    """Drawn by the dialling side; the bulk connection joins by it."""
    run: Run
    """32 bytes, or empty if this peer does not know the run yet."""
    name: Name
    addresses: AddressList
    """Where this peer listens, as multiaddrs; empty if it only dials."""


class Hello(Message, frozen=True):
    """First message in each direction of a control connection."""

    body: Annotated[bytes, msgspec.Meta(max_length=limits.HELLO_BYTES)]
    """Encoded HelloBody."""
    signature: Signature
    """Ed25519 over the domain of HELLO and `body`."""


class Attach(Message, frozen=True):
    """First message of a bulk connection; answered by the same bytes with kind ATTACHED."""

    session: Nonce


class Bye(Message, frozen=True):
    """The sender ends the session."""

    code: Annotated[str, msgspec.Meta(max_length=40)]
    detail: Reason


class Ping(Message, frozen=True):
    """Answered by a PONG with the same content."""

    number: Count


class DoorRequest(msgspec.Struct, frozen=True, array_like=True):
    """What a newcomer that knows only host:port asks the hello door. Fields that newer versions append are not looked at: the answer states
    the versions spoken here."""

    protocol_min: Count
    protocol_max: Count
    nonce: Nonce


class DoorHead(msgspec.Struct, frozen=True, array_like=True):
    """How every version of DoorBody begins; fields after these are not looked at."""

    public_key: Key
    nonce: Nonce
    unix_ms: Count
    protocol_min: Count
    protocol_max: Count


class DoorBody(Message, frozen=True):
    """Who lives here; signed as the bytes that were sent."""

    public_key: Key
    nonce: Nonce
    """The asker's, so that the answer is fresh."""
    unix_ms: Count
    protocol_min: Count
    protocol_max: Count
    run: Run
    name: Name
    link_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    observed: AddressText
    """The asker's address as seen here; tells it whether a router is in between."""


class DoorReply(Message, frozen=True):
    """Answer of the hello door."""

    body: Annotated[bytes, msgspec.Meta(max_length=limits.DOOR_REPLY_BYTES)]
    signature: Signature


class BlobOpen(Message, frozen=True):
    """Ask for a blob by name. Asking again with the same transfer number goes on with the blob that is still open."""

    transfer: Count
    name: BlobName


class BlobOpened(Message, frozen=True):
    """The blob is held open; `root` commits to its chunk hashes."""

    transfer: Count
    size: Annotated[int, msgspec.Meta(ge=0, le=limits.BLOB_BYTES)]
    root: Key


class BlobFailed(Message, frozen=True):
    """The blob cannot be (or is no longer) served."""

    transfer: Count
    code: Annotated[str, msgspec.Meta(max_length=40)]
    detail: Reason


class BlobHashesWanted(Message, frozen=True):
    """Ask for the hashes of chunks `first` up to a page."""

    transfer: Count
    first: Count


class BlobHashes(Message, frozen=True):
    """One page of chunk hashes, 32 bytes each."""

    transfer: Count
    first: Count
    hashes: Annotated[bytes, msgspec.Meta(max_length=32 * limits.HASHES_PER_PAGE)]


class BlobWanted(Message, frozen=True):
    """Credit: these chunks may be sent now."""

    transfer: Count
    chunks: Annotated[list[Count], msgspec.Meta(max_length=limits.WINDOW_MAX_CHUNKS)]


class BlobClose(Message, frozen=True):
    """The receiver is done."""

    transfer: Count


_M = TypeVar("_M", bound=msgspec.Struct)
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: dict[type[msgspec.Struct], msgspec.msgpack.Decoder[Any]] = {
    message: msgspec.msgpack.Decoder(message)
    for message in (
        HelloHead, HelloBody, Hello, Attach, Bye, Ping, DoorRequest, DoorHead, DoorBody, DoorReply,
        BlobOpen, BlobOpened, BlobFailed, BlobHashesWanted, BlobHashes, BlobWanted, BlobClose,
    )
}  # fmt: skip


def encode(message: msgspec.Struct) -> bytes:
    """msgpack bytes of a message."""
    return _ENCODER.encode(message)


def decode(message: type[_M], data: bytes) -> _M:
    """Read exactly one message of the given type. Raises Refused("bad-message")."""
    try:
        value = _DECODERS[message].decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Refused("bad-message", f"A {message.__name__} message is malformed: {str(error)[:150]}") from error
    assert isinstance(value, message)
    return value


def check_versions(head: HelloHead | DoorHead) -> None:
    """Raises Refused("version") if the other side has no protocol version in common with this one."""
    if max(head.protocol_min, limits.PROTOCOL_MIN) > min(head.protocol_max, limits.PROTOCOL_MAX):
        theirs, ours = f"{head.protocol_min} to {head.protocol_max}", f"{limits.PROTOCOL_MIN} to {limits.PROTOCOL_MAX}"
        raise Refused("version", f"The peer speaks protocol versions {theirs}, this one {ours}. Update the older program.")


def bye_of(code: str, detail: str) -> Bye:
    """A Bye with its texts cut to the limits."""
    return Bye(code[:40], detail[: limits.REASON_CHARACTERS])
