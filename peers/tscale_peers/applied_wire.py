"""Bytes of applied sets and of a chunk's entries: compact, canonical, read strictly.

Enters: an `AppliedSet`, or bytes from a stranger. Leaves: bytes, or a set.
    set    = version u8 | chunks | streams | stream...                       numbers are LEB128 varints in their shortest form
    stream = kind u8 (0) | key 40 B | batches | runs | (length, contiguous)... | chunks with extras | extra...
    extra  = chunk gap | ranges | (gap, length)...
    entry  = kind u8 (0) | key 40 B | batches | ranges | (gap, length)...    of one chunk
Streams ascend by key. `runs` spells `contiguous` run by run, since nearly always all chunks stand at one number. A range is spelt by
its gap to the end of the one before, and its length. Kinds other than 0 are reserved for tombstones and refused until they exist.
The reader allocates `chunks` numbers per stream, so the caller's `max_streams` bounds memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tscale_peers import limits
from tscale_peers.applied import STREAM_KEY_BYTES, AppliedSet, ChunkEntry, Stream
from tscale_peers.errors import refuse
from tscale_peers.ranges import Range

VERSION = 1
KIND_PACKETS = 0
_VARINT_MAX_BYTES = 10


class Reader:
    """Strict cursor. Raises Refused("bad-applied-set")."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        return self.take(1)[0]

    def take(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._data):
            raise bad("it ends early")
        part = self._data[self._at : end]
        self._at = end
        return part

    def number(self, most: int = limits.applied_seq_max) -> int:
        """A varint in its shortest form, at most `most`."""
        value = shift = 0
        for _ in range(_VARINT_MAX_BYTES):
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                if byte == 0 and shift > 7:
                    raise bad("a number is not in its shortest form")
                if value > most:
                    raise bad(f"a number is {value}, above {most}")
                return value
        raise bad("a number is too long")

    def finish(self) -> None:
        if self._at != len(self._data):
            raise bad(f"{len(self._data) - self._at} bytes follow its end")


def bad(why: str) -> Exception:
    return refuse("bad-applied-set", f"applied set: {why}")


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


# -- whole sets --------------------------------------------------------------------------------------------------------


def encode_set(applied: AppliedSet) -> bytes:
    parts = [bytes([VERSION]), varint(applied.chunks), varint(len(applied.streams))]
    parts += [_encode_stream(key, applied.streams[key]) for key in sorted(applied.streams)]
    return b"".join(parts)


def decode_set(data: bytes, chunks: int, max_streams: int) -> AppliedSet:
    reader = Reader(data)
    version = reader.byte()
    if version != VERSION:
        raise bad(f"version {version}; this program speaks {VERSION}: update the older side")
    if reader.number() != chunks:
        raise bad(f"it is not about {chunks} chunks: the sender runs another manifest")
    count = reader.number()
    if count > max_streams:
        raise refuse("too-many-streams", f"applied set: {count} streams, the limit is {max_streams}")
    applied = AppliedSet(chunks, max_streams)
    before = b""
    for _ in range(count):
        key = _read_key(reader, before)
        applied.streams[key] = _decode_stream(reader, chunks)
        before = key
    reader.finish()
    return applied


def _encode_stream(key: bytes, stream: Stream) -> bytes:
    starts = np.flatnonzero(np.diff(stream.contiguous, prepend=-1))
    lengths = np.diff(starts, append=len(stream.contiguous))
    parts = [bytes([KIND_PACKETS]), key, varint(stream.batches), varint(len(starts))]
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        parts += [varint(length), varint(int(stream.contiguous[start]))]
    parts.append(varint(len(stream.extras)))
    before = -1
    for chunk in sorted(stream.extras):
        parts += [varint(chunk - before - 1), _encode_ranges(stream.extras[chunk])]
        before = chunk
    return b"".join(parts)


def _decode_stream(reader: Reader, chunks: int) -> Stream:
    stream = Stream(np.zeros(chunks, dtype=np.int64), batches=reader.number())
    _decode_runs(reader, stream.contiguous)
    before = -1
    for _ in range(reader.number(chunks)):
        chunk = before + 1 + reader.number(chunks)
        if chunk >= chunks:
            raise bad(f"it speaks of chunk {chunk} of {chunks}")
        pairs = _decode_ranges(reader)
        if not pairs or pairs[0][0] <= int(stream.contiguous[chunk]) + 1:
            raise bad("numbers beyond a gap do not lie beyond one")
        stream.extras[chunk] = pairs
        before = chunk
    if stream.is_empty():
        raise bad("a stream is empty")
    return stream


def _decode_runs(reader: Reader, contiguous: np.ndarray) -> None:
    at, before = 0, -1
    for _ in range(reader.number(len(contiguous))):
        length, value = reader.number(len(contiguous)), reader.number()
        if length == 0 or value == before or at + length > len(contiguous):
            raise bad("its runs are not in canonical form")
        contiguous[at : at + length] = value
        at, before = at + length, value
    if at != len(contiguous):
        raise bad("its runs do not cover all chunks")


# -- one chunk's entries -----------------------------------------------------------------------------------------------


def encode_entries(entries: Iterable[ChunkEntry]) -> bytes:
    """Entries ascending by stream key -> bytes."""
    parts = [bytes([KIND_PACKETS]) + e.stream_key + varint(e.batches) + _encode_ranges(e.seqs) for e in entries]
    return varint(len(parts)) + b"".join(parts)


def decode_entries(data: bytes, max_streams: int) -> list[ChunkEntry]:
    """Strict reading. Raises Refused("bad-applied-set"), "too-many-streams"."""
    reader = Reader(data)
    count = reader.number()
    if count > max_streams:
        raise refuse("too-many-streams", f"snapshot chunk: {count} streams, the limit is {max_streams}")
    entries: list[ChunkEntry] = []
    for _ in range(count):
        key = _read_key(reader, entries[-1].stream_key if entries else b"")
        batches = reader.number()
        seqs = tuple(_decode_ranges(reader))
        if not seqs:
            raise bad("an entry is empty")
        entries.append(ChunkEntry(key, batches, seqs))
    reader.finish()
    return entries


# -- parts -------------------------------------------------------------------------------------------------------------


def _read_key(reader: Reader, before: bytes) -> bytes:
    kind = reader.byte()
    if kind != KIND_PACKETS:
        raise bad(f"a record of kind {kind}, which this program does not know: update it")
    key = reader.take(STREAM_KEY_BYTES)
    if key <= before:
        raise bad("its streams do not ascend")
    return key


def _encode_ranges(pairs: Iterable[Range]) -> bytes:
    spelt, before = [], -1
    for first, last in pairs:
        spelt.append(varint(first - before - 2) + varint(last - first))
        before = last
    return varint(len(spelt)) + b"".join(spelt)


def _decode_ranges(reader: Reader) -> list[Range]:
    """Gaps are spelt from the least legal start, so every spelling is canonical: the first range starts at 1 or later."""
    pairs: list[Range] = []
    before = -1
    for _ in range(reader.number(limits.applied_ranges_per_chunk + 1)):
        first = before + 2 + reader.number()
        last = first + reader.number()
        if last > limits.applied_seq_max:
            raise bad("a packet number is out of range")
        pairs.append((first, last))
        before = last
    return pairs
