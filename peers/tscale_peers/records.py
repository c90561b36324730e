"""Signed peer records: what each peer says of itself, spread by everybody.

Enters: the fields of one's own record, or signed bytes from anyone. Leaves: checked records, newest per peer.
A record is authentic whoever relays it. (incarnation, seq) only grows; the newest wins. The book is bounded: a full book forgets the record
that was heard longest ago, but never one that is pinned (own, and linked peers'), so invented peers cannot push out real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from tscale_net.errors import Refused
from tscale_net.identity import peer_id_of
from tscale_net.ports import PeerId
from tscale_peers import limits

DOMAIN = b"tscale-fed/record/1"
SIGNATURE_BYTES = 64

Sign = Callable[[bytes, bytes], bytes]
"""(domain, message) -> 64-byte Ed25519 signature."""
Verify = Callable[[bytes, bytes, bytes, bytes], bool]
"""(public key, domain, message, signature) -> authentic?"""


class PeerRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One peer's word about itself at one moment. Rates per second; `digest` and `hash` are a pair of the replica's recent states."""

    run: bytes
    public_key: bytes
    incarnation: int
    """Start of the process, Unix milliseconds."""
    seq: int
    created_unix: float
    name: str
    role: str
    addresses: tuple[str, ...]
    step: int
    batches: int
    tokens: int
    tokens_per_s: float
    train_loss: float
    digest: bytes
    hash: bytes
    leaving: bool
    down_bytes_per_s: float = 0.0
    """What its connection receives at most, as far as it knows; 0: it knows no bound."""
    eval_batches: int = 0
    """Batches in the basepoint that it measured last on the run's fixed held-out text; 0: none yet."""
    eval_loss: float = math.nan
    """Loss of that basepoint, nats per token."""
    average_loss: float = math.nan
    """The same of its newest running average."""
    links: tuple[bytes, ...] = ()
    """Peers that it has links to, by the first bytes of their public keys (routing.py); a peer with many names some of them."""

    @property
    def peer(self) -> PeerId:
        return _peer_id_of(self.public_key)

    @property
    def age_key(self) -> tuple[int, int]:
        return (self.incarnation, self.seq)


_peer_id_of = lru_cache(limits.record_book_peers * 4)(peer_id_of)
"""Base58 is slow beside everything else that is done with a record."""


def author_of(stream_key: bytes) -> PeerId:
    """The peer behind an author stream."""
    return _peer_id_of(stream_key[:32])


_decoder = msgspec.msgpack.Decoder(PeerRecord)


def seal(record: PeerRecord, sign: Sign) -> bytes:
    """Signed wire form: signature, then body."""
    body = msgspec.msgpack.encode(record)
    return sign(DOMAIN, body) + body


def read_unverified(data: bytes, run: bytes) -> tuple[PeerRecord, bytes, bytes]:
    """(record, signed body, signature), checked in every way but the signature. Raises Refused: "bad-record", "wrong-run"."""
    if not SIGNATURE_BYTES < len(data) <= limits.record_max_bytes:
        raise Refused("bad-record", f"a peer record of {len(data)} bytes")
    record, body = _read(data)
    if record.run != run:
        raise Refused("wrong-run", "a peer record of another run")
    return record, body, data[:SIGNATURE_BYTES]


@lru_cache(limits.records_read)
def _read(data: bytes) -> tuple[PeerRecord, bytes]:
    """(record, signed body). The same bytes are often read again at once, and by all peers of a simulation."""
    body = data[SIGNATURE_BYTES:]
    try:
        record = _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise Refused("bad-record", f"a peer record that cannot be read: {error}") from None
    if not _plausible(record):
        raise Refused("bad-record", "a peer record with a field out of range")
    return record, body


def open_sealed(data: bytes, run: bytes, verify: Verify) -> PeerRecord:
    """Everything a receiver relies on, the signature last because it is the dearest.

    Raises Refused: "bad-record", "wrong-run", "bad-signature".
    """
    record, body, signature = read_unverified(data, run)
    if not verify(record.public_key, DOMAIN, body, signature):
        raise Refused("bad-signature", "a peer record with a bad signature")
    return record


def _plausible(r: PeerRecord) -> bool:
    counts = (r.incarnation, r.seq, r.step, r.batches, r.tokens, r.eval_batches)
    return (
        len(r.public_key) == 32
        and len(r.digest) in (0, 32)
        and len(r.hash) in (0, 32)
        and all(0 <= n <= limits.count_max for n in counts)
        and math.isfinite(r.tokens_per_s)
        and 0 <= r.tokens_per_s <= limits.record_max_tokens_per_s
        and math.isfinite(r.down_bytes_per_s)
        and r.down_bytes_per_s >= 0
        and math.isfinite(r.created_unix)
        and len(r.name) <= limits.record_max_name_chars
        and r.name.isprintable()
        and r.role in ("peer", "seed")
        and len(r.addresses) <= limits.record_max_addresses
        and len(r.links) <= limits.record_max_links
        and all(len(node) == limits.node_bytes for node in r.links)
        and all(len(a) <= limits.record_max_address_chars and a.isprintable() for a in r.addresses)
    )


@dataclass(slots=True)
class Heard:
    """A record as kept: with its signed bytes for relaying, and when it was first heard here."""

    record: PeerRecord
    sealed: bytes
    heard_at: float


class RecordBook:
    """Newest record per peer."""

    def __init__(self, run: bytes, verify: Verify) -> None:
        self._run = run
        self._verify = verify
        self._heard: dict[PeerId, Heard] = {}
        self._sealed: dict[bytes, PeerId] = {}
        """Bytes of the records in the book: most of what neighbours tell is known, and need not be read again."""
        self.pinned: set[PeerId] = set()
        self.links_version = 0
        """Counts how often it has changed who is in the book, which links they state, or whether they have a replica yet."""

    def __len__(self) -> int:
        return len(self._heard)

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._heard

    def get(self, peer: PeerId) -> Heard | None:
        return self._heard.get(peer)

    def newest(self, peer: PeerId) -> bytes | None:
        """The signed record of a peer."""
        heard = self._heard.get(peer)
        return heard.sealed if heard is not None else None

    def author_of(self, sealed: bytes) -> PeerId | None:
        """Whose record these bytes are, if they are in the book."""
        return self._sealed.get(sealed)

    def items(self) -> Iterable[tuple[PeerId, Heard]]:
        """Every peer's newest record."""
        return self._heard.items()

    def all(self) -> Iterable[Heard]:
        return self._heard.values()

    def learn(self, sealed: bytes, now: float, wall: float | None = None) -> PeerRecord | None:
        """The record if it is news, None if it is known or older. Raises Refused as `open_sealed`.

        wall: Unix time. A record that is older than `record_old_s` by its own date counts as heard that much earlier: who tells a newcomer
        of peers long gone does not make them live.
        """
        if sealed in self._sealed:
            return None
        record, body, signature = read_unverified(sealed, self._run)
        peer = record.peer
        before = self._heard.get(peer)
        if before is not None and before.record.age_key >= record.age_key:
            return None
        if not self._verify(record.public_key, DOMAIN, body, signature):
            raise Refused("bad-signature", "a peer record with a bad signature")
        stale_s = max(0.0, wall - record.created_unix - limits.record_old_s) if wall is not None else 0.0
        if before is not None:
            self._forget(peer)
        self._heard[peer] = Heard(record, sealed, now - stale_s)
        if before is None or before.record.links != record.links or bool(before.record.digest) != bool(record.digest):
            self.links_version += 1
        self._sealed[sealed] = peer
        if len(self._heard) > limits.record_book_peers:
            self._forget_one()
        return record

    def outdates(self, sealed: bytes, peer: PeerId) -> bool:
        """Is this an older word of `peer` about itself than the one in the book?"""
        before = self._heard.get(peer)
        if before is None or sealed in self._sealed:
            return False
        record, _, _ = read_unverified(sealed, self._run)
        return record.peer == peer and record.age_key < before.record.age_key

    def _forget_one(self) -> None:
        free = [peer for peer in self._heard if peer not in self.pinned] or list(self._heard)
        self._forget(min(free, key=lambda peer: self._heard[peer].heard_at))

    def _forget(self, peer: PeerId) -> None:
        self._sealed.pop(self._heard.pop(peer).sealed, None)
