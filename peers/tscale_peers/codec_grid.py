"""Codecs "int8" and "int4": a code of 8 or 4 bits per value, and an integer step per block of 128 or 64 values.

Enters and leaves: as every codec (codec_contract.py). Arithmetic: `tscale_kernels.delta_int8`, `delta_int4`. Blocks are counted from the
beginning of each segment, since segments have units of their own; a segment's last block may be shorter.
Payload: step codes (uint16, little-endian, one per block), then the codes (int8, or two of 4 bits to a byte, the first one low), segment
after segment. Its size is fixed by the chunk.
One spelling: a step has one code; a block has step 0 exactly where all its codes are 0; -128 and -8 are no codes.
`write` and `read` take some of a chunk's segments, for codecs that leave only part of a chunk to this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tscale_kernels import delta_int4, delta_int8
from tscale_kernels.delta_blocks import Grid
from tscale_kernels.delta_onebit import codes_to_steps, steps_to_codes
from tscale_kernels.dispatch import BackendName
from tscale_peers.codec_contract import CodecMemory, Placed, check_length, host_array, not_finite
from tscale_peers.errors import refuse
from tscale_peers.layout import Chunk, Segment

_CODE_BYTES = 2
Encode = Callable[[Tensor, float, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Width:
    """What differs between 8 and 4 bits. values_per_byte: 1 or 2; dtype: of the codes' bytes in the kernels."""

    grid: Grid
    values_per_byte: int
    dtype: torch.dtype
    encode: Encode
    apply: Callable[[Tensor, Tensor, Tensor, int], None]
    leak: Callable[[Tensor, Tensor, Tensor, BackendName | None], None]

    def code_bytes(self, segment: Segment) -> int:
        """Bytes of a segment's codes. Segments have a multiple of 8 values."""
        return segment.rows * segment.cols // self.values_per_byte

    def blocks(self, segment: Segment) -> int:
        """Blocks, and steps, of a segment."""
        return self.grid.blocks(segment.rows * segment.cols)

    def payload_bytes(self, segments: Sequence[Segment]) -> int:
        """Exact size of what `write` gives."""
        return sum(self.blocks(s) * _CODE_BYTES + self.code_bytes(s) for s in segments)

    @cached_property
    def magnitudes(self) -> np.ndarray:
        """uint8 [256]: the largest |code| in a byte."""
        byte = np.arange(256)
        if self.values_per_byte == 1:
            return np.abs(byte.astype(np.uint8).view(np.int8).astype(np.int16)).astype(np.uint8)
        low, high = np.abs(((byte & 15) ^ 8) - 8), np.abs(((byte >> 4) ^ 8) - 8)
        return np.maximum(low, high).astype(np.uint8)

    def peaks(self, codes: np.ndarray) -> np.ndarray:
        """Largest |code| of each block of one segment, as int64. codes: uint8, the segment's bytes."""
        each = self.grid.values // self.values_per_byte
        sizes = np.take(self.magnitudes, codes)
        return np.maximum.reduceat(sizes, np.arange(0, sizes.size, each)).astype(np.int64)


INT8 = Width(delta_int8.GRID, 1, torch.int8, delta_int8.encode_unchecked, delta_int8.apply, delta_int8.leak)
INT4 = Width(delta_int4.GRID, 2, torch.uint8, delta_int4.encode_unchecked, delta_int4.apply, delta_int4.leak)


@dataclass(frozen=True, slots=True)
class GridDelta:
    """Placed: steps int32 [blocks], codes [bytes], of all `segments` one after the other."""

    width: Width
    segments: tuple[Segment, ...]
    placed: Placed
    largest_step: int

    def add_to(self, basepoint: Tensor, sign: int = 1) -> None:
        for s, steps, codes in self._parts(basepoint.device):
            self.width.apply(basepoint[s.start : s.stop], codes, steps, sign)

    def take_from(self, displacement: Tensor, divisor: float = 1.0) -> None:
        # Kernels know fp32 alone.
        backend: BackendName | None = "ref" if displacement.dtype == torch.float64 else None
        for s, steps, codes in self._parts(displacement.device):
            amounts = (steps.to(torch.float64) * (s.unit / divisor)).to(displacement.dtype)
            self.width.leak(displacement[s.start : s.stop], codes, amounts, backend)

    def _parts(self, device: torch.device) -> list[tuple[Segment, Tensor, Tensor]]:
        steps, codes = self.placed.on(device)
        of_steps = steps.split([self.width.blocks(s) for s in self.segments])
        of_codes = codes.split([self.width.code_bytes(s) for s in self.segments])
        return list(zip(self.segments, of_steps, of_codes, strict=True))


def write(width: Width, displacement: Tensor, chunk: Chunk, segments: Sequence[Segment], coefficient: float) -> bytes:
    """Payload of some segments of a chunk. displacement: the chunk's flat fp32 or fp64 values. Raises Refused("not-finite")."""
    if not segments:
        return b""
    made = [width.encode(displacement[s.start : s.stop], coefficient, s.unit_exponent) for s in segments]
    steps = torch.from_numpy(host_array(steps for _, steps in made))
    if bool((steps < 0).any()):
        raise not_finite(chunk)
    return steps_to_codes(steps).numpy().astype("<u2").tobytes() + host_array(codes for codes, _ in made).tobytes()


def read(width: Width, payload: bytes, chunk: Chunk, segments: Sequence[Segment]) -> GridDelta:
    """What `write` wrote, checked. Raises Refused: "packet-truncated", "packet-oversized", "packet-scale", "packet-payload"."""
    check_length(payload, width.payload_bytes(segments))
    count = sum(width.blocks(s) for s in segments)
    written = np.frombuffer(payload, dtype="<u2", count=count).astype(np.int32)
    steps, valid = codes_to_steps(torch.from_numpy(written))
    wrong = ~valid.numpy() | (steps.numpy() > width.grid.max_step)
    if wrong.any():
        block = int(wrong.argmax())
        raise refuse("packet-scale", f"block {block} of chunk {chunk.index} has scale code {int(written[block])}, which no encoder writes")
    codes = np.frombuffer(payload, dtype=np.uint8, offset=count * _CODE_BYTES).copy()
    peaks = _peaks(width, codes, segments)
    spelling = (peaks > width.grid.largest_code) | ((peaks == 0) != (steps.numpy() == 0))
    if spelling.any():
        raise refuse("packet-payload", f"block {int(spelling.argmax())} of chunk {chunk.index} has codes that no encoder writes")
    largest = int((peaks * steps.numpy()).max(initial=0))
    return GridDelta(width, tuple(segments), Placed(steps, torch.from_numpy(codes).view(width.dtype)), largest)


def _peaks(width: Width, codes: np.ndarray, segments: Sequence[Segment]) -> np.ndarray:
    ends = np.cumsum([width.code_bytes(s) for s in segments])
    return np.concatenate([np.zeros(0, dtype=np.int64), *(width.peaks(part) for part in np.split(codes, ends) if part.size)])


@dataclass(frozen=True, slots=True)
class GridCodec:
    """See the module's head."""

    name: str
    width: Width
    basepoint_dtype: torch.dtype = torch.int32

    def max_payload_bytes(self, chunk: Chunk) -> int:
        return self.width.payload_bytes(chunk.segments)

    def encode(self, displacement: Tensor, chunk: Chunk, coefficient: float, memory: CodecMemory | None = None) -> bytes:
        return write(self.width, displacement, chunk, chunk.segments, coefficient)

    def open(self, payload: bytes, chunk: Chunk) -> GridDelta:
        return read(self.width, payload, chunk, chunk.segments)
