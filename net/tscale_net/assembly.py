"""A blob while it is received: which chunks are still to be asked for, which are here, what was written.

Enters: verified root, chunk hashes, chunks from any source in any order. Leaves: the content, in order, into memory or a file.
Rule: a chunk is accepted only if its length and hash are those that the root commits to. Chunks are written in order, so the content hash
is computed on the way and a file is written once; only a bounded number may wait for an earlier one.
"""

from __future__ import annotations

import asyncio
import heapq
import io
from collections.abc import Callable
from typing import BinaryIO

from blake3 import blake3

from tscale_net import limits
from tscale_net.blobs import HASH_BYTES, chunk_count, chunk_length, root_of
from tscale_net.errors import Refused

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""


class Assembly:
    """One blob under construction; may be fed by several sources."""

    def __init__(self, size: int, root: bytes, sink: BinaryIO | None, progress: Progress | None) -> None:
        self.size = size
        self.root = root
        self.chunks = chunk_count(size)
        self.hashes: bytes | None = None
        """All chunk hashes once they fit the root."""
        self.changed = asyncio.Event()
        """Set whenever waiting sources should look again."""
        # BytesIO hands out its buffer without a copy, so a large blob does not stall the loop at its end.
        self._memory = io.BytesIO()
        self._sink = sink if sink is not None else self._memory
        self._progress = progress
        self._hasher = blake3()
        self._written = 0
        self._next_fresh = 0
        self._returned: list[int] = []
        self._asked_s: dict[int, float] = {}
        self._early: dict[int, bytes | memoryview] = {}

    def set_hashes(self, hashes: bytes) -> None:
        """Accept the list of chunk hashes. Raises Refused("corrupt-chunk") if the root does not commit to it."""
        if len(hashes) != self.chunks * HASH_BYTES or root_of(self.size, hashes) != self.root:
            raise Refused("corrupt-chunk", "The list of chunk hashes does not fit the root that was announced.")
        self.hashes = hashes
        self.changed.set()

    @property
    def complete(self) -> bool:
        """Whether every chunk was written."""
        return self.hashes is not None and self._written == self.chunks

    def take(self, count: int, now_s: float) -> list[int]:
        """Up to `count` chunks to ask a source for: given back ones, then new ones, then those that another source is slow with."""
        taken: list[int] = []
        while len(taken) < count and self._returned:
            index = heapq.heappop(self._returned)
            if self._missing(index) and index not in self._asked_s:
                taken.append(index)
        while len(taken) < count and self._next_fresh < min(self.chunks, self._written + limits.AHEAD_CHUNKS):
            taken.append(self._next_fresh)
            self._next_fresh += 1
        if not taken:
            late = [index for index, asked_s in self._asked_s.items() if now_s - asked_s > limits.STEAL_AFTER_S]
            taken = sorted(late)[:count]
        for index in taken:
            self._asked_s[index] = now_s
        return taken

    def give_back(self, indexes: list[int]) -> None:
        """A source will not deliver these."""
        for index in indexes:
            if self._asked_s.pop(index, None) is not None and self._missing(index):
                heapq.heappush(self._returned, index)
        self.changed.set()

    def _missing(self, index: int) -> bool:
        return index >= self._written and index not in self._early

    def put(self, index: int, data: bytes | memoryview) -> bool:
        """Accept a chunk; False if it was here already. Raises Refused("corrupt-chunk"), and OSError if the file cannot be written."""
        assert self.hashes is not None
        if len(data) != chunk_length(self.size, index):
            raise Refused("corrupt-chunk", f"Chunk {index} has {len(data)} bytes instead of {chunk_length(self.size, index)}.")
        if blake3(data).digest() != self.hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]:
            raise Refused("corrupt-chunk", f"Chunk {index} does not have the hash that was announced.")
        self._asked_s.pop(index, None)
        if not self._missing(index):
            return False
        self._early[index] = data
        while self._written in self._early:
            self._write(self._early.pop(self._written))
        self.changed.set()
        return True

    def _write(self, data: bytes | memoryview) -> None:
        self._hasher.update(data)
        self._sink.write(data)
        self._written += 1
        if self._progress is not None:
            self._progress(min(self._written * limits.CHUNK_BYTES, self.size), self.size)

    def content_hash(self) -> bytes:
        """BLAKE3 (32 bytes) of what was written."""
        return self._hasher.digest()

    def content(self) -> bytes:
        """What was received; empty if it went to a file."""
        return self._memory.getvalue()
