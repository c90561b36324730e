"""What a log of packets is: its interface, its index, and the log that lives in memory.

Enters: checked packets with their keys. Leaves: their bytes by key, until retention drops them.
`MemoryLog` serves simulations and tests; the log on disk is in delta_log.py. One test suite runs on both.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from tscale_peers import limits
from tscale_peers.packet import Key


class PacketLog(Protocol):
    """What exchange, gossip and recovery need. All methods may be called from any thread."""

    def append(self, body: bytes, key: Key, fsync: bool = False) -> bool:
        """Keep one packet; False if the key is there already. Raises Refused("log-write")."""
        ...

    def append_all(self, packets: Sequence[tuple[bytes, Key]], fsync: bool = False) -> None:
        """Keep several, with one sync at the end. Raises Refused("log-write"); then none of them counts."""
        ...

    def get(self, key: Key) -> bytes | None: ...

    def holds(self, key: Key) -> bool:
        """Whether `get` has something to read; reads nothing."""
        ...

    def keys(self, stream_key: bytes, first: int = 1, last: int = limits.applied_seq_max, chunk: int | None = None) -> list[Key]:
        """Keys of one stream (and chunk), seq from `first` to `last`, ascending by seq, then chunk."""
        ...

    def all_keys(self) -> list[Key]: ...

    def oldest(self, stream_key: bytes) -> int:
        """Lowest seq kept of a stream; 0 if none."""
        ...

    def latest(self, stream_key: bytes, chunk: int) -> int:
        """Highest seq kept of a stream and chunk; 0 if none."""
        ...

    def hold(self, stream_key: bytes, seq: int) -> None:
        """Never drop numbers >= seq of this stream, until told otherwise."""
        ...


class LogIndex:
    """stream -> chunk -> seq -> where. Not thread-safe: its log locks."""

    def __init__(self) -> None:
        self._streams: dict[bytes, dict[int, dict[int, object]]] = {}

    def put(self, key: Key, where: object) -> None:
        self._streams.setdefault(key[0], {}).setdefault(key[2], {})[key[1]] = where

    def get(self, key: Key) -> object | None:
        return self._streams.get(key[0], {}).get(key[2], {}).get(key[1])

    def drop(self, key: Key) -> None:
        chunks = self._streams.get(key[0], {})
        seqs = chunks.get(key[2], {})
        seqs.pop(key[1], None)
        if not seqs:
            chunks.pop(key[2], None)
        if not chunks:
            self._streams.pop(key[0], None)

    def keys(self, stream_key: bytes, first: int, last: int, chunk: int | None) -> list[Key]:
        chunks = self._streams.get(stream_key, {})
        wanted = chunks if chunk is None else ({chunk} & chunks.keys())
        found = [(stream_key, seq, c) for c in wanted for seq in chunks[c] if first <= seq <= last]
        return sorted(found, key=lambda key: (key[1], key[2]))

    def all_keys(self) -> list[Key]:
        return [(stream, seq, chunk) for stream, chunks in self._streams.items() for chunk, seqs in chunks.items() for seq in seqs]

    def oldest(self, stream_key: bytes) -> int:
        return min((min(seqs) for seqs in self._streams.get(stream_key, {}).values()), default=0)

    def latest(self, stream_key: bytes, chunk: int | None = None) -> int:
        chunks = self._streams.get(stream_key, {})
        return max((max(chunks[c]) for c in (chunks if chunk is None else {chunk} & chunks.keys())), default=0)


class IndexedLog:
    """What both logs answer from their index alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._index = LogIndex()

    def holds(self, key: Key) -> bool:
        with self._lock:
            return self._index.get(key) is not None

    def keys(self, stream_key: bytes, first: int = 1, last: int = limits.applied_seq_max, chunk: int | None = None) -> list[Key]:
        with self._lock:
            return self._index.keys(stream_key, first, last, chunk)

    def all_keys(self) -> list[Key]:
        with self._lock:
            return self._index.all_keys()

    def oldest(self, stream_key: bytes) -> int:
        with self._lock:
            return self._index.oldest(stream_key)

    def latest(self, stream_key: bytes, chunk: int) -> int:
        with self._lock:
            return self._index.latest(stream_key, chunk)


class MemoryLog(IndexedLog):
    """The same without a disk."""

    def __init__(self, retain_per_stream: int = limits.log_default_retain) -> None:
        super().__init__()
        self._retain = retain_per_stream
        self._hold: dict[bytes, int] = {}

    def append(self, body: bytes, key: Key, fsync: bool = False) -> bool:
        with self._lock:
            if self._index.get(key) is not None:
                return False
            self._index.put(key, body)
            self._trim(key[0])
            return True

    def append_all(self, packets: Sequence[tuple[bytes, Key]], fsync: bool = False) -> None:
        for body, key in packets:
            self.append(body, key)

    def get(self, key: Key) -> bytes | None:
        with self._lock:
            body = self._index.get(key)
        return body if isinstance(body, bytes) else None

    def hold(self, stream_key: bytes, seq: int) -> None:
        with self._lock:
            self._hold[stream_key] = seq

    def _trim(self, stream_key: bytes) -> None:
        """Numbers at most `retain` below the stream's newest stay, and those held."""
        keep_from = min(self._index.latest(stream_key) - self._retain + 1, self._hold.get(stream_key, limits.applied_seq_max))
        if self._index.oldest(stream_key) < keep_from:
            for key in self._index.keys(stream_key, 1, keep_from - 1, None):
                self._index.drop(key)
