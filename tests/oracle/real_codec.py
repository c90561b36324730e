"""A codec without a grid: float64 deltas, 8 bytes each, and a float64 basepoint.

It lets the production replica, packets and exchange run the rule in real arithmetic, so that an oracle can judge the rule itself beyond
the rounding of the grid. Addition in float64 does not commute exactly: for a common order only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tscale_peers.codec import CodecMemory
from tscale_peers.layout import Chunk


@dataclass(frozen=True, slots=True)
class RealDelta:
    values: Tensor
    largest_step: int = 0
    """Real arithmetic has no range to leave."""

    def add_to(self, basepoint: Tensor, sign: int = 1) -> None:
        basepoint.add_(self.values, alpha=sign)

    def take_from(self, displacement: Tensor, divisor: float = 1.0) -> None:
        displacement.sub_(self.values / divisor)


@dataclass(frozen=True, slots=True)
class RealCodec:
    """All unit exponents must be 0."""

    name: str = "real"
    basepoint_dtype: torch.dtype = torch.float64

    def max_payload_bytes(self, chunk: Chunk) -> int:
        return chunk.size * 8

    def encode(self, displacement: Tensor, chunk: Chunk, coefficient: float, memory: CodecMemory | None = None) -> bytes:
        return (displacement.double() * coefficient).numpy().astype("<f8").tobytes()

    def open(self, payload: bytes, chunk: Chunk) -> RealDelta:
        return RealDelta(torch.from_numpy(np.frombuffer(payload, dtype="<f8").astype(np.float64)))
