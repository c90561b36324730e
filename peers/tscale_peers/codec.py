"""Codecs: how a chunk of displacement becomes payload bytes, and these become integer steps that everybody adds.

Enters: the displacement of a chunk, the author's coefficient c. Leaves: payload bytes of a size that layout and codec fix beforehand; a
`Delta`, opened from checked payload, that adds itself to a basepoint.
Contract of every codec, relied on by the replica:
- a decoded delta is c*q as integer multiples of each segment's unit, by integer arithmetic alone, so all receivers add the same numbers;
- q = decoded / c satisfies ||d - q|| <= ||d|| up to the rounding of steps to units; the author keeps the remainder (error feedback);
- a payload has one spelling and one length; `open` refuses every other.
The arithmetic belongs to the codec (`basepoint_dtype`): production codecs use int32; a test may bring one in float64 to compare the rule
itself with an oracle beyond the grid, through the same replica and exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tscale_kernels import delta_onebit
from tscale_kernels.limits import max_step
from tscale_peers.errors import refuse
from tscale_peers.layout import Chunk


class Delta(Protocol):
    """A decoded payload of one chunk."""

    @property
    def largest_step(self) -> int:
        """No value of the basepoint moves by more than this many units."""
        ...

    def add_to(self, basepoint: Tensor, sign: int = 1) -> None:
        """basepoint += sign * c*q in units, in place. basepoint: the chunk's flat values, codec.basepoint_dtype."""
        ...

    def take_from(self, displacement: Tensor, divisor: float = 1.0) -> None:
        """displacement -= c*q / divisor in weight units, in place. displacement: the chunk's flat values, fp32 or fp64."""
        ...


class Codec(Protocol):
    """One way to write deltas. Stateless."""

    @property
    def name(self) -> str: ...

    @property
    def basepoint_dtype(self) -> torch.dtype: ...

    def payload_bytes(self, chunk: Chunk) -> int:
        """Exact length of every payload for this chunk."""
        ...

    def encode(self, displacement: Tensor, chunk: Chunk, coefficient: float) -> bytes:
        """Payload of c * codec(d). displacement: the chunk's flat fp32 or fp64 values on the CPU. Raises Refused("not-finite")."""
        ...

    def open(self, payload: bytes, chunk: Chunk) -> Delta:
        """Check and decode. Raises Refused: "packet-truncated", "packet-oversized", "packet-scale"."""
        ...


# -- one bit -----------------------------------------------------------------------------------------------------------

_CODE_BYTES = 2


@dataclass(frozen=True, slots=True)
class SignDelta:
    """Steps int32 [rows of the chunk], sign bits uint8 [size / 8]."""

    chunk: Chunk
    steps: Tensor
    bits: Tensor

    @property
    def largest_step(self) -> int:
        return int(self.steps.max())

    def add_to(self, basepoint: Tensor, sign: int = 1) -> None:
        for s in self.chunk.segments:
            bits, steps = self.bits[s.start // 8 : s.stop // 8], self.steps[s.row : s.row + s.rows]
            delta_onebit.apply(s.matrix(basepoint), bits, steps, sign)

    def take_from(self, displacement: Tensor, divisor: float = 1.0) -> None:
        for s in self.chunk.segments:
            bits, steps = self.bits[s.start // 8 : s.stop // 8], self.steps[s.row : s.row + s.rows]
            amounts = (steps.to(torch.float64) * (s.unit / divisor)).to(displacement.dtype)
            delta_onebit.leak(s.matrix(displacement), bits, amounts)


@dataclass(frozen=True, slots=True)
class SignCodec:
    """One bit per value and a 16-bit step per row: codes (uint16, little-endian, one per row of the chunk), then the packed signs."""

    name: str = "sign"
    basepoint_dtype: torch.dtype = torch.int32

    def payload_bytes(self, chunk: Chunk) -> int:
        return chunk.rows * _CODE_BYTES + chunk.size // 8

    def encode(self, displacement: Tensor, chunk: Chunk, coefficient: float) -> bytes:
        codes, bits = [], []
        for s in chunk.segments:
            try:
                packed, steps = delta_onebit.encode(s.matrix(displacement), coefficient, s.unit_exponent)
            except ValueError:
                raise _not_finite(chunk) from None
            codes.append(delta_onebit.steps_to_codes(steps).numpy().astype("<u2").tobytes())
            bits.append(packed.numpy().tobytes())
        return b"".join(codes + bits)

    def open(self, payload: bytes, chunk: Chunk) -> SignDelta:
        _check_length(payload, self.payload_bytes(chunk))
        codes = np.frombuffer(payload, dtype="<u2", count=chunk.rows).astype(np.int32)
        steps, valid = delta_onebit.codes_to_steps(torch.from_numpy(codes))
        if not bool(valid.all()):
            row = int((~valid).nonzero()[0])
            raise refuse("packet-scale", f"row {row} of chunk {chunk.index} has scale code {int(codes[row])}, which no encoder writes")
        bits = np.frombuffer(payload, dtype=np.uint8, offset=chunk.rows * _CODE_BYTES).copy()
        return SignDelta(chunk, steps, torch.from_numpy(bits))


# -- uncompressed ------------------------------------------------------------------------------------------------------

_STEP_BYTES = 4


@dataclass(frozen=True, slots=True)
class ExactDelta:
    """One int32 step per value."""

    chunk: Chunk
    steps: Tensor

    @property
    def largest_step(self) -> int:
        return int(self.steps.abs().max())

    def add_to(self, basepoint: Tensor, sign: int = 1) -> None:
        basepoint.add_(self.steps, alpha=sign)

    def take_from(self, displacement: Tensor, divisor: float = 1.0) -> None:
        for s in self.chunk.segments:
            amounts = self.steps[s.start : s.stop].to(torch.float64) * (s.unit / divisor)
            displacement[s.start : s.stop].sub_(amounts.to(displacement.dtype))


@dataclass(frozen=True, slots=True)
class ExactCodec:
    """Each value rounded to its unit: 4 bytes per value. For tests, and for comparing what one bit costs."""

    name: str = "exact"
    basepoint_dtype: torch.dtype = torch.int32

    def payload_bytes(self, chunk: Chunk) -> int:
        return chunk.size * _STEP_BYTES

    def encode(self, displacement: Tensor, chunk: Chunk, coefficient: float) -> bytes:
        if not bool(torch.isfinite(displacement).all()):
            raise _not_finite(chunk)
        steps = torch.empty(chunk.size, dtype=torch.int32)
        for s in chunk.segments:
            scaled = displacement[s.start : s.stop].to(torch.float64) * (coefficient / s.unit)
            steps[s.start : s.stop] = torch.round(scaled).clamp(-max_step, max_step).to(torch.int32)
        return steps.numpy().astype("<i4").tobytes()

    def open(self, payload: bytes, chunk: Chunk) -> ExactDelta:
        _check_length(payload, self.payload_bytes(chunk))
        steps = torch.from_numpy(np.frombuffer(payload, dtype="<i4").astype(np.int32))
        # Two comparisons instead of abs(): the absolute value of the least int32 is itself.
        if bool(((steps > max_step) | (steps < -max_step)).any()):
            raise refuse("packet-scale", f"chunk {chunk.index} has a step above {max_step} units")
        return ExactDelta(chunk, steps)


# -- registry ----------------------------------------------------------------------------------------------------------

CODECS: dict[str, Codec] = {codec.name: codec for codec in (SignCodec(), ExactCodec())}


def codec_named(name: str) -> Codec:
    """The codec that a manifest names. Raises Refused("packet-codec") listing those known."""
    if name not in CODECS:
        raise refuse("packet-codec", f"codec {name!r} is not known here; known: {', '.join(sorted(CODECS))}")
    return CODECS[name]


def _check_length(payload: bytes, expected: int) -> None:
    if len(payload) != expected:
        code = "packet-truncated" if len(payload) < expected else "packet-oversized"
        raise refuse(code, f"a payload of {len(payload)} bytes where its chunk and codec give {expected}")


def _not_finite(chunk: Chunk) -> Exception:
    where = f"chunk {chunk.index}"
    return refuse("not-finite", f"{where}: the local weights hold NaN or infinite values; lower the rate or restore a checkpoint")
