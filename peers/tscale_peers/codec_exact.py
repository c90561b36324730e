"""Codec "exact": each value rounded to its unit, 4 bytes per value. For tests, and for comparing what a smaller delta costs.

Enters and leaves: as every codec (codec_contract.py). Payload: the steps (int32, little-endian). Its size is fixed by the chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tscale_kernels.limits import max_step
from tscale_peers.codec_contract import CodecMemory, Placed, check_length, host_array, not_finite
from tscale_peers.errors import refuse
from tscale_peers.layout import Chunk

_STEP_BYTES = 4


@dataclass(frozen=True, slots=True)
class ExactDelta:
    """Placed: one int32 step per value."""

    chunk: Chunk
    placed: Placed
    largest_step: int

    def add_to(self, basepoint: Tensor, sign: int = 1) -> None:
        (steps,) = self.placed.on(basepoint.device)
        basepoint.add_(steps, alpha=sign)

    def take_from(self, displacement: Tensor, divisor: float = 1.0) -> None:
        (steps,) = self.placed.on(displacement.device)
        for s in self.chunk.segments:
            amounts = steps[s.start : s.stop].to(torch.float64) * (s.unit / divisor)
            displacement[s.start : s.stop].sub_(amounts.to(displacement.dtype))


@dataclass(frozen=True, slots=True)
class ExactCodec:
    """See the module's head."""

    name: str = "exact"
    basepoint_dtype: torch.dtype = torch.int32

    def max_payload_bytes(self, chunk: Chunk) -> int:
        return chunk.size * _STEP_BYTES

    def encode(self, displacement: Tensor, chunk: Chunk, coefficient: float, memory: CodecMemory | None = None) -> bytes:
        if not bool(torch.isfinite(displacement).all()):
            raise not_finite(chunk)
        steps = []
        for s in chunk.segments:
            scaled = displacement[s.start : s.stop].to(torch.float64) * (coefficient / s.unit)
            steps.append(torch.round(scaled).clamp(-max_step, max_step).to(torch.int32))
        return host_array(steps).astype("<i4").tobytes()

    def open(self, payload: bytes, chunk: Chunk) -> ExactDelta:
        check_length(payload, self.max_payload_bytes(chunk))
        steps = torch.from_numpy(np.frombuffer(payload, dtype="<i4").astype(np.int32))
        # Two comparisons instead of abs(): the absolute value of the least int32 is itself.
        if bool(((steps > max_step) | (steps < -max_step)).any()):
            raise refuse("packet-scale", f"chunk {chunk.index} has a step above {max_step} units")
        return ExactDelta(chunk, Placed(steps), int(steps.abs().max()))
