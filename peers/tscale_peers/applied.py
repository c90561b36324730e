"""Which packets a replica contains: per author stream and chunk, the highest number without a gap and what lies beyond gaps.

Enters: packet keys, other sets (as bytes from strangers). Leaves: membership, what is lacking, a digest, canonical bytes.
Two sets are equal exactly if their digests are; and because the basepoint is an exact sum, equal sets mean equal basepoints.
Digest: BLAKE3 over the streams in order, each by its own BLAKE3, kept until the stream changes: a packet costs one short hash, however many
streams there are. Batch counts ride along and are no part of the digest.
Not thread-safe: the replica guards its own set by its lock, and hands out copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3

from tscale_peers import limits, ranges
from tscale_peers.errors import refuse
from tscale_peers.ranges import Range

STREAM_KEY_BYTES = 40
Missing = tuple[bytes, int, int, int]
"""(stream key, chunk, first seq, last seq), both inclusive."""


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """What one stream has contributed to one chunk, as carried by a snapshot chunk."""

    stream_key: bytes
    batches: int
    seqs: tuple[Range, ...]


@dataclass(slots=True)
class Stream:
    """One author stream. `contiguous` int64 [chunks]: packets 1..n are in; `extras`: ranges beyond the first gap, by chunk."""

    contiguous: np.ndarray
    extras: dict[int, list[Range]] = field(default_factory=dict)
    batches: int = 0
    digest: bytes = b""

    def seqs(self, chunk: int) -> list[Range]:
        """All numbers of one chunk as canonical ranges."""
        n = int(self.contiguous[chunk])
        return ([(1, n)] if n else []) + self.extras.get(chunk, [])

    def set_seqs(self, chunk: int, seqs: Iterable[Range]) -> None:
        """Replace one chunk's numbers by canonical ranges."""
        pairs = list(seqs)
        self.contiguous[chunk] = pairs.pop(0)[1] if pairs and pairs[0][0] == 1 else 0
        self.extras.pop(chunk, None)
        if pairs:
            self.extras[chunk] = pairs
        self.digest = b""

    def is_empty(self) -> bool:
        return not self.extras and not self.contiguous.any()

    def counted_batches(self, most_per_packet: int) -> int:
        """The batches that the author states, as far as its packets of chunk 0 bear them out."""
        packets = int(self.contiguous[0]) + sum(last - first + 1 for first, last in list(self.extras.get(0, ())))
        return min(self.batches, packets * most_per_packet)

    def extras_bytes(self) -> bytes:
        """Canonical bytes of the extras, for hashing."""
        return b"".join(_numbers(chunk, first, last) for chunk in sorted(self.extras) for first, last in self.extras[chunk])


class AppliedSet:
    """See the module's head."""

    def __init__(self, chunks: int, max_streams: int = limits.applied_default_streams) -> None:
        self.chunks = chunks
        self.max_streams = max_streams
        self.streams: dict[bytes, Stream] = {}
        self._digest = b""

    # -- packets -------------------------------------------------------------------------------------------------------

    def add(self, stream_key: bytes, seq: int, chunk: int) -> bool:
        """Note one packet; False if it was there.

        Raises Refused: "too-many-streams", "too-many-gaps" (nothing is changed). ValueError for a key that no packet check lets through.
        """
        self._check_key(stream_key, seq, chunk)
        stream = self.streams.get(stream_key)
        if stream is None:
            stream = self._new_stream(stream_key)
        changed = self._add(stream, seq, chunk)
        if changed:
            self.streams[stream_key] = stream
            stream.digest = b""
            self._digest = b""
        return changed

    def can_add(self, stream_key: bytes, seq: int, chunk: int) -> bool:
        """False if it is there already. Raises as `add` would; changes nothing."""
        self._check_key(stream_key, seq, chunk)
        if self.contains(stream_key, seq, chunk):
            return False
        stream = self.streams.get(stream_key)
        if stream is None:
            self._new_stream(stream_key)
        else:
            self._check_gaps(stream, seq, chunk)
        return True

    def contains(self, stream_key: bytes, seq: int, chunk: int) -> bool:
        stream = self.streams.get(stream_key)
        if stream is None or not 0 <= chunk < self.chunks:
            return False
        return 1 <= seq <= stream.contiguous[chunk] or ranges.contains(stream.extras.get(chunk, ()), seq)

    def highest(self, stream_key: bytes, chunk: int) -> int:
        """Highest number seen, gaps or not; 0 if none."""
        seqs = self.seqs(stream_key, chunk)
        return seqs[-1][1] if seqs else 0

    def seqs(self, stream_key: bytes, chunk: int) -> list[Range]:
        """All numbers of one stream and chunk, as canonical ranges."""
        stream = self.streams.get(stream_key)
        return stream.seqs(chunk) if stream else []

    def note_batches(self, stream_key: bytes, batches: int) -> None:
        """The stream's author had done this many batches; the largest count is kept."""
        stream = self.streams.get(stream_key)
        if stream is not None:
            stream.batches = max(stream.batches, batches)

    @property
    def batches(self) -> dict[bytes, int]:
        """Batches per stream."""
        return {key: stream.batches for key, stream in list(self.streams.items())}

    def total_batches(self, most_per_packet: int | None = None, without: bytes = b"") -> int:
        """Batches of the whole swarm, as far as its packets have come here. Safe from any thread.

        Authors state their batches themselves; with `most_per_packet` a stream counts for at most that many times its packets of chunk 0;
        one of sums, which state the batches of many, for `sum_batches_factor` times as many. `without`: a stream that is left out.
        """
        streams = [(key, stream) for key, stream in list(self.streams.items()) if key != without]
        if most_per_packet is None:
            return sum(stream.batches for _, stream in streams)
        most_per_sum = most_per_packet * limits.sum_batches_factor
        return sum(stream.counted_batches(most_per_sum if is_of_sums(key) else most_per_packet) for key, stream in streams)

    def __len__(self) -> int:
        return len(self.streams)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AppliedSet) and self.digest() == other.digest()

    __hash__ = None  # type: ignore[assignment]

    def _add(self, stream: Stream, seq: int, chunk: int) -> bool:
        done = int(stream.contiguous[chunk])
        if seq <= done:
            return False
        if seq > done + 1:
            self._check_gaps(stream, seq, chunk)
            return ranges.insert(stream.extras.setdefault(chunk, []), seq)
        beyond = stream.extras.get(chunk)
        if beyond and beyond[0][0] == seq + 1:
            seq = beyond.pop(0)[1]
            if not beyond:
                del stream.extras[chunk]
        stream.contiguous[chunk] = seq
        return True

    def _check_gaps(self, stream: Stream, seq: int, chunk: int) -> None:
        beyond = stream.extras.get(chunk, ())
        if seq > stream.contiguous[chunk] + 1 and len(beyond) >= limits.applied_ranges_per_chunk and not ranges.contains(beyond, seq):
            raise refuse(
                "too-many-gaps", f"packet {seq} of chunk {chunk}: its author left {len(beyond)} gaps; send older ones first"
            )

    def _new_stream(self, stream_key: bytes) -> Stream:
        if len(self.streams) >= self.max_streams:
            raise refuse("too-many-streams", f"stream {stream_key[:4].hex()} is one more than the run allows ({self.max_streams})")
        return Stream(np.zeros(self.chunks, dtype=np.int64))

    def _check_key(self, stream_key: bytes, seq: int, chunk: int) -> None:
        if len(stream_key) != STREAM_KEY_BYTES or not 1 <= seq <= limits.applied_seq_max or not 0 <= chunk < self.chunks:
            raise ValueError(f"not a packet key: stream of {len(stream_key)} bytes, seq {seq}, chunk {chunk} of {self.chunks}")

    # -- comparing -----------------------------------------------------------------------------------------------------

    def missing_from(self, other: AppliedSet) -> Iterator[Missing]:
        """What `other` holds and this set lacks, as (stream key, chunk, first seq, last seq), streams and chunks ascending."""
        for key in sorted(other.streams):
            theirs, mine = other.streams[key], self.streams.get(key)
            ahead = theirs.contiguous > (mine.contiguous if mine else 0)
            for chunk in sorted({*np.flatnonzero(ahead).tolist(), *theirs.extras}):
                for first, last in ranges.subtract(theirs.seqs(chunk), mine.seqs(chunk) if mine else []):
                    yield (key, chunk, first, last)

    def digest(self) -> bytes:
        """32 bytes, equal exactly for equal sets of packets."""
        if not self._digest:
            hasher = blake3(b"applied/1" + _numbers(self.chunks))
            for key in sorted(self.streams):
                hasher.update(self._stream_digest(key))
            self._digest = hasher.digest()
        return self._digest

    def chunk_digest(self, chunk: int) -> bytes:
        """32 bytes, equal exactly if the sets are equal as far as one chunk is concerned."""
        hasher = blake3(b"applied-chunk/1" + _numbers(chunk))
        for entry in self.chunk_entries(chunk):
            hasher.update(entry.stream_key + _numbers(len(entry.seqs)))
            for pair in entry.seqs:
                hasher.update(_numbers(*pair))
        return hasher.digest()

    def _stream_digest(self, key: bytes) -> bytes:
        stream = self.streams[key]
        if not stream.digest:
            hasher = blake3(key)
            hasher.update(stream.contiguous.astype("<i8").tobytes())
            hasher.update(stream.extras_bytes())
            stream.digest = hasher.digest()
        return stream.digest

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def chunk_entries(self, chunk: int) -> list[ChunkEntry]:
        """What has gone into one chunk, streams ascending; empty ones are left out."""
        found = ((key, self.streams[key]) for key in sorted(self.streams))
        entries = (ChunkEntry(key, stream.batches, tuple(stream.seqs(chunk))) for key, stream in found)
        return [entry for entry in entries if entry.seqs]

    def replace_chunk(self, chunk: int, entries: Iterable[ChunkEntry]) -> None:
        """Set one chunk's part, as its values are replaced by a snapshot's. Raises Refused("too-many-streams") before any change."""
        fresh = {entry.stream_key: entry for entry in entries}
        if len(self.streams.keys() | fresh.keys()) > self.max_streams:
            raise refuse("too-many-streams", f"a snapshot chunk brings more streams than the run allows ({self.max_streams})")
        for key in fresh.keys() - self.streams.keys():
            self.streams[key] = Stream(np.zeros(self.chunks, dtype=np.int64))
        for key, stream in list(self.streams.items()):
            entry = fresh.get(key)
            stream.set_seqs(chunk, entry.seqs if entry else ())
            stream.batches = max(stream.batches, entry.batches if entry else 0)
            if stream.is_empty():
                del self.streams[key]
        self._digest = b""

    def copy(self) -> AppliedSet:
        """An independent set with the same contents."""
        twin = AppliedSet(self.chunks, self.max_streams)
        for key, stream in self.streams.items():
            extras = {chunk: list(pairs) for chunk, pairs in stream.extras.items()}
            twin.streams[key] = Stream(stream.contiguous.copy(), extras, stream.batches, stream.digest)
        return twin

    def only(self, stream_key: bytes) -> AppliedSet:
        """A copy that holds one stream alone."""
        twin = self.copy()
        twin.streams = {key: stream for key, stream in twin.streams.items() if key == stream_key}
        return twin

    # -- wire ----------------------------------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """Canonical bytes: equal sets with equal batch counts give equal bytes."""
        from tscale_peers.applied_wire import encode_set

        return encode_set(self)

    @staticmethod
    def decode(data: bytes, chunks: int, max_streams: int = limits.applied_default_streams) -> AppliedSet:
        """Strict reading. Raises Refused("bad-applied-set"), "too-many-streams"."""
        from tscale_peers.applied_wire import decode_set

        return decode_set(data, chunks, max_streams)


def is_of_sums(stream_key: bytes) -> bool:
    """Does this stream hold the sums of an owner of chunks? The highest bit of its number says so."""
    return stream_key[-1] >= 0x80


def _numbers(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)
