"""Token shards: one long row of token ids, kept in several files.

`ShardWriter` takes ids in any portions and writes files of equal token counts, hashing as it writes. `TokenStream` maps the files into
memory and reads any stretch, across file borders: opening 100 GB costs milliseconds, and what is not read is never loaded.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from tscale_fed.data import limits
from tscale_fed.data.manifest import START_BYTES, Split, SplitRecord, shard_name, starts_name
from tscale_fed.data.tokenizer import Tokens
from tscale_net.errors import Refused


def token_type(token_bytes: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Little-endian on disk on every machine."""
    return np.dtype("<u2") if token_bytes == 2 else np.dtype("<u4")


class HashedFile:
    """A file that is hashed while it is written and is on the disk when closed."""

    def __init__(self, path: Path) -> None:
        self._stream: BinaryIO = path.open("xb", buffering=limits.READ_BLOCK_BYTES)
        self._hasher = blake3()

    def write(self, data: memoryview | bytes) -> None:
        self._stream.write(data)
        self._hasher.update(data)

    def close(self) -> str:
        """Flush to the disk; returns the blake3, 64 hex digits."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return self._hasher.hexdigest()

    def abandon(self) -> None:
        """Close without a promise about the content. A full disk has been reported already; do not report it twice."""
        try:
            self._stream.close()
        except OSError:
            pass


class ShardWriter:
    """Writes one split into `directory`. Not for reading while it writes."""

    def __init__(self, directory: Path, split: Split, token_bytes: int, shard_bytes: int = limits.SHARD_BYTES) -> None:
        self._directory = directory
        self._split = split
        self._type = token_type(token_bytes)
        self._shard_tokens = shard_bytes // token_bytes
        self._starts = HashedFile(directory / starts_name(split))
        self._documents = 0
        self._shard: HashedFile | None = None
        self._room = 0
        self._hashes: list[str] = []
        self._text_bytes = 0
        self.tokens = 0

    def write(self, ids: Tokens, text_bytes: int) -> None:
        """Append ids [n] that stand for `text_bytes` bytes of text."""
        self._text_bytes += text_bytes
        left = ids.astype(self._type, copy=False)
        while left.size:
            if self._shard is None:
                self._shard = HashedFile(self._directory / shard_name(self._split, len(self._hashes)))
                self._room = self._shard_tokens
            part, left = left[: self._room], left[self._room :]
            self._shard.write(np.ascontiguousarray(part).view(np.uint8).data)
            self.tokens += part.size
            self._room -= part.size
            if self._room == 0:
                self._close_shard()

    def start_document(self, doc_start: int) -> None:
        """Append a document-start token and note its position."""
        self._starts.write(self.tokens.to_bytes(START_BYTES, "little"))
        self._documents += 1
        self.write(np.array([doc_start], self._type), 0)

    def close(self) -> SplitRecord:
        """Everything is on the disk when this returns."""
        self._close_shard()
        return SplitRecord(self.tokens, self._text_bytes, self._documents, self._shard_tokens, self._hashes, self._starts.close())

    def abandon(self) -> None:
        """Give up without a record; the files are for deleting."""
        self._starts.abandon()
        if self._shard is not None:
            self._shard.abandon()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._hashes.append(self._shard.close())
            self._shard = None


class TokenStream:
    """The ids of one split, read through memory maps. Safe to use from several threads."""

    def __init__(self, directory: Path, split: Split, record: SplitRecord, token_bytes: int) -> None:
        """Raises Refused("bad-data") if a shard is missing or has another size than the manifest says."""
        self.tokens = record.tokens
        self._maps: list[Tokens] = []
        self._ends: list[int] = []
        end = 0
        for index, size in enumerate(record.shard_sizes()):
            self._maps.append(_map_shard(directory / shard_name(split, index), size, token_type(token_bytes)))
            end += size
            self._ends.append(end)

    def read(self, start: int, out: npt.NDArray[np.int64]) -> None:
        """Fill `out` [n] with the ids from position `start`; the caller stays within 0 <= start <= tokens - n."""
        index = bisect_right(self._ends, start)
        filled = 0
        while filled < out.size:
            shard = self._maps[index]
            offset = start + filled - (self._ends[index] - shard.size)
            part = shard[offset : offset + out.size - filled]
            out[filled : filled + part.size] = part
            filled += part.size
            index += 1


def _map_shard(path: Path, tokens: int, dtype: np.dtype[np.unsignedinteger[Any]]) -> Tokens:
    size = path.stat().st_size if path.is_file() else -1
    if size != tokens * dtype.itemsize:
        found = "is missing" if size < 0 else f"has {size} bytes, not {tokens * dtype.itemsize}"
        raise Refused("bad-data", f"{path} {found}: import the text again or fetch the data anew.")
    # A plain array over the map: slicing np.memmap itself costs several times as much.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
