"""One chunk of a snapshot as bytes: integer values and what has been applied to them. Self-contained, so donors freeze nothing.

Enters: values and applied entries of one moment, or bytes from a donor. Leaves: bytes, or both, checked.
    version u8 | packing u8 | chunk u32 | entries length u32 | entries | values          little-endian
packing 0: the values as they are, 4 bytes each. packing 1: zigzag (sign to the lowest bit), split into byte planes, highest first, then
lz4: small weights leave the highest planes nearly empty. Used only where it is shorter. The reader knows the size beforehand, so nothing
unpacks to more than the chunk. Integrity on the way is the transfer's business; truth shows in comparing hashes with other peers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import lz4.block
import numpy as np
import torch
from torch import Tensor

from tscale_peers.applied import ChunkEntry
from tscale_peers.applied_wire import decode_entries, encode_entries
from tscale_peers.errors import refuse

VERSION = 1
PLAIN, PLANES = 0, 1
_HEAD = struct.Struct("<BBII")


def raw_bytes(values: Tensor) -> bytes:
    """Values as they are, little-endian, on every machine."""
    array = values.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def encode(index: int, values: Tensor, entries: Sequence[ChunkEntry]) -> bytes:
    """values: the chunk's flat basepoint, int32 (or what the codec uses)."""
    listed = encode_entries(entries)
    plain = raw_bytes(values)
    packed = _pack(values) if values.dtype == torch.int32 else plain
    packing, body = (PLANES, packed) if len(packed) < len(plain) else (PLAIN, plain)
    return _HEAD.pack(VERSION, packing, index, len(listed)) + listed + body


def decode(data: bytes, index: int, size: int, dtype: torch.dtype, max_streams: int) -> tuple[Tensor, list[ChunkEntry]]:
    """(values [size], entries). Raises Refused: "bad-chunk", "bad-applied-set", "too-many-streams"."""
    if len(data) < _HEAD.size:
        raise _bad(index, "it ends before its header does")
    version, packing, stated, listed = _HEAD.unpack_from(data)
    if version != VERSION:
        raise _bad(index, f"version {version}; this program speaks {VERSION}: update the older side")
    if stated != index:
        raise _bad(index, f"it is chunk {stated}")
    if len(data) < _HEAD.size + listed:
        raise _bad(index, "it ends before its list of packets does")
    entries = decode_entries(data[_HEAD.size : _HEAD.size + listed], max_streams)
    body = data[_HEAD.size + listed :]
    nbytes = size * torch.empty(0, dtype=dtype).element_size()
    if packing == PLANES and dtype == torch.int32:
        return _unpack(body, size, index), entries
    if packing != PLAIN:
        raise _bad(index, f"packing {packing} is not known: update the program")
    if len(body) != nbytes:
        raise _bad(index, f"{len(body)} bytes of values instead of {nbytes}")
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    return torch.from_numpy(np.frombuffer(body, dtype=kind.newbyteorder("<")).astype(kind)), entries


def _pack(values: Tensor) -> bytes:
    array = values.numpy()
    zigzag = ((array << 1) ^ (array >> 31)).astype(">u4")
    planes = np.ascontiguousarray(zigzag.view(np.uint8).reshape(-1, 4).T)
    return bytes(lz4.block.compress(planes, store_size=False))


def _unpack(body: bytes, size: int, index: int) -> Tensor:
    try:
        planes = lz4.block.decompress(body, uncompressed_size=size * 4)
    except lz4.block.LZ4BlockError:
        raise _bad(index, "its compressed values are damaged") from None
    if len(planes) != size * 4:
        raise _bad(index, f"its values unpack to {len(planes)} bytes instead of {size * 4}")
    big = np.ascontiguousarray(np.frombuffer(planes, dtype=np.uint8).reshape(4, size).T).view(">u4").reshape(size)
    zigzag = big.astype(np.uint32)
    return torch.from_numpy(((zigzag >> 1) ^ -(zigzag & 1).astype(np.uint32)).view(np.int32))


def _bad(index: int, why: str) -> Exception:
    return refuse("bad-chunk", f"snapshot chunk {index}: {why}")
