"""Codec "sign": one bit per value and a 16-bit step per row.

Enters and leaves: as every codec (codec_contract.py). Arithmetic: `tscale_kernels.delta_onebit` (1-bit SGD with error feedback).
Payload: step codes (uint16, little-endian, one per row of the chunk), then the signs, eight to a byte. Its size is fixed by the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tscale_kernels import delta_onebit
from tscale_peers.codec_contract import CodecMemory, Placed, check_length, host_array, not_finite
from tscale_peers.errors import refuse
from tscale_peers.layout import Chunk

_CODE_BYTES = 2


@dataclass(frozen=True, slots=True)
class SignDelta:
    """Placed: steps int32 [rows of the chunk], sign bits uint8 [size / 8]."""

    chunk: Chunk
    placed: Placed
    largest_step: int

    def add_to(self, basepoint: Tensor, sign: int = 1) -> None:
        steps, bits = self.placed.on(basepoint.device)
        for s in self.chunk.segments:
            delta_onebit.apply(s.matrix(basepoint), bits[s.start // 8 : s.stop // 8], steps[s.row : s.row + s.rows], sign)

    @staticmethod
    def add_many(deltas: Sequence[SignDelta], basepoint: Tensor) -> None:
        """`add_to` of several deltas of one chunk, in one pass over the basepoint (delta_batch.py)."""
        placed = [delta.placed.on(basepoint.device) for delta in deltas]
        steps, bits = (torch.stack(listed) for listed in zip(*placed, strict=True))
        for s in deltas[0].chunk.segments:
            of_rows, of_bits = steps[:, s.row : s.row + s.rows], bits[:, s.start // 8 : s.stop // 8]
            delta_onebit.apply_many(s.matrix(basepoint), of_bits.contiguous(), of_rows.contiguous())

    def take_from(self, displacement: Tensor, divisor: float = 1.0) -> None:
        steps, bits = self.placed.on(displacement.device)
        for s in self.chunk.segments:
            amounts = (steps[s.row : s.row + s.rows].to(torch.float64) * (s.unit / divisor)).to(displacement.dtype)
            delta_onebit.leak(s.matrix(displacement), bits[s.start // 8 : s.stop // 8], amounts)


@dataclass(frozen=True, slots=True)
class SignCodec:
    """See the module's head."""

    name: str = "sign"
    basepoint_dtype: torch.dtype = torch.int32

    def max_payload_bytes(self, chunk: Chunk) -> int:
        return chunk.rows * _CODE_BYTES + chunk.size // 8

    def encode(self, displacement: Tensor, chunk: Chunk, coefficient: float, memory: CodecMemory | None = None) -> bytes:
        codes, bits = [], []
        for s in chunk.segments:
            try:
                packed, steps = delta_onebit.encode(s.matrix(displacement), coefficient, s.unit_exponent)
            except ValueError:
                raise not_finite(chunk) from None
            codes.append(delta_onebit.steps_to_codes(steps))
            bits.append(packed)
        return host_array(codes).astype("<u2").tobytes() + host_array(bits).tobytes()

    def open(self, payload: bytes, chunk: Chunk) -> SignDelta:
        check_length(payload, self.max_payload_bytes(chunk))
        codes = np.frombuffer(payload, dtype="<u2", count=chunk.rows).astype(np.int32)
        steps, valid = delta_onebit.codes_to_steps(torch.from_numpy(codes))
        if not bool(valid.all()):
            row = int((~valid).nonzero()[0])
            raise refuse("packet-scale", f"row {row} of chunk {chunk.index} has scale code {int(codes[row])}, which no encoder writes")
        bits = np.frombuffer(payload, dtype=np.uint8, offset=chunk.rows * _CODE_BYTES).copy()
        return SignDelta(chunk, Placed(steps, torch.from_numpy(bits)), int(steps.max()))
