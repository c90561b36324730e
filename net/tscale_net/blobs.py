"""A blob as its server holds it and as its receiver checks it: size, chunk hashes, and one root that commits to both.

Enters: bytes or a `BlobSource`. Leaves: `OpenBlob`, whose chunks can be read, and the pure functions that both sides share.
Rule: a blob is cut into chunks of 256 KiB (the last is shorter); each chunk has a BLAKE3 hash; the root is BLAKE3 over a domain, the
size and all hashes. The receiver learns the root first, so that every later byte can be checked when it arrives.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from blake3 import blake3

from tscale_net import limits
from tscale_net.errors import Refused

HASH_BYTES = 32
_ROOT_DOMAIN = b"tscale-fed/blob/1\0"


class BlobSource(Protocol):
    """Something that can be read at any offset, such as an open file. It must not change while it is served."""

    size: int
    """Bytes."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        ...


class BytesSource:
    """Bytes in memory as a BlobSource."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size = len(content)

    def read(self, offset: int, length: int) -> bytes:
        return self._content[offset : offset + length]


def chunk_count(size: int) -> int:
    """Number of chunks of a blob of `size` bytes."""
    return -(-size // limits.CHUNK_BYTES)


def chunk_length(size: int, index: int) -> int:
    """Bytes of chunk `index`."""
    return min(limits.CHUNK_BYTES, size - index * limits.CHUNK_BYTES)


def root_of(size: int, hashes: bytes) -> bytes:
    """The root (32 bytes) of a blob with this size and these chunk hashes."""
    return blake3(_ROOT_DOMAIN + size.to_bytes(8, "little") + hashes).digest()


class OpenBlob:
    """A blob that is being served."""

    def __init__(self, source: BlobSource) -> None:
        self.size = source.size
        self.hashes = b""
        """All chunk hashes; complete after `hash_all`."""
        self.root = b""
        self._source = source

    async def hash_all(self) -> None:
        """Read and hash every chunk, letting the event loop run in between. Raises Refused("blob-failed")."""
        if not 0 <= self.size <= limits.BLOB_BYTES:
            raise Refused("blob-failed", f"The blob has {self.size} bytes; at most {limits.BLOB_BYTES} can be served.")
        hashes = bytearray()
        for index in range(chunk_count(self.size)):
            hashes += blake3(self.read_chunk(index)).digest()
            await asyncio.sleep(0)
        self.hashes = bytes(hashes)
        self.root = root_of(self.size, self.hashes)

    def read_chunk(self, index: int) -> bytes:
        """The bytes of one chunk. Raises Refused("blob-failed")."""
        length = chunk_length(self.size, index)
        try:
            data = self._source.read(index * limits.CHUNK_BYTES, length)
        except OSError as error:
            raise Refused("blob-failed", f"The blob cannot be read ({(error.strerror or str(error)).lower()}).") from error
        if len(data) != length:
            raise Refused("blob-failed", f"The blob changed while it was served: {len(data)} bytes instead of {length}.")
        return data
