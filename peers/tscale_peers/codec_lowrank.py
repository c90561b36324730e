"""Codec "lowrank": of each matrix int8 factors of R directions, and the largest values of what these leave.

Enters and leaves: as every codec (codec_contract.py). R = 8 directions unless the name says otherwise ("lowrank-16").
Each segment [rows, cols] of a chunk goes one of two ways, which its shape alone decides:
- factored, if the factors have at most half as many values as the matrix: 2 * R * (rows + cols) <= rows * cols.
  `tscale_kernels.delta_lowrank`: P [rows, R], Q [cols, R] and an exponent by one subspace iteration (PowerSGD, Vogels et al. 2019) that
  goes on from the last publication's; the decoded delta is a sum of int8 products, the same on every device.
- otherwise (vectors, the few rows at a matrix's end that share a chunk with the next one): codes and steps of "int8" (codec_grid.py).
A delta of low rank alone confines training to the directions that the author happens to send (LoRDO, ICML 2026). So what the factors
leave of the factored segments goes through "topk-sign" (codec_topk.py) in the same packet: of any remainder the largest values are sent,
whatever its directions are, and the rest stays in the author's displacement.

Payload: i8 exponent of each factored segment | int8 P, Q of each factored segment, row-major | "int8" of the other segments | "topk-sign"
of the factored segments, to the end. A part without segments is empty.
One spelling: of the exponents and factors (-128 is no code; a product of zeros has factors and exponent 0), and of the other parts as
their codecs say. (The same sum of products may have other factors as well: they are another payload, which its author must sign.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tscale_kernels import delta_lowrank
from tscale_kernels.dispatch import BackendName
from tscale_kernels.limits import lowrank_min_exponent, max_step
from tscale_peers import codec_grid, limits
from tscale_peers.codec_contract import CodecMemory, Delta, Placed, host_array, not_finite
from tscale_peers.codec_grid import INT8
from tscale_peers.codec_topk import TopkCodec
from tscale_peers.errors import refuse
from tscale_peers.layout import Chunk, Segment


@dataclass(frozen=True, slots=True)
class FactoredDelta:
    """Placed: exponents int32 [segments], then P and Q, int8, of each segment."""

    segments: tuple[Segment, ...]
    placed: Placed
    largest_step: int

    def add_to(self, basepoint: Tensor, sign: int = 1) -> None:
        exponents, *factors = self.placed.on(basepoint.device)
        for at, s in enumerate(self.segments):
            delta_lowrank.apply(s.matrix(basepoint), factors[2 * at], factors[2 * at + 1], exponents[at : at + 1], sign)

    def take_from(self, displacement: Tensor, divisor: float = 1.0) -> None:
        exponents, *factors = self.placed.on(displacement.device)
        # Kernels know fp32 alone.
        backend: BackendName | None = "ref" if displacement.dtype == torch.float64 else None
        for at, s in enumerate(self.segments):
            p, q, exponent = factors[2 * at], factors[2 * at + 1], exponents[at : at + 1]
            delta_lowrank.leak(s.matrix(displacement), p, q, exponent, s.unit / divisor, backend)


@dataclass(frozen=True, slots=True)
class LowRankDelta:
    """The parts add up: int8 of some segments; factors, and the largest values of what these leave, of the others."""

    parts: tuple[Delta, ...]
    largest_step: int

    def add_to(self, basepoint: Tensor, sign: int = 1) -> None:
        for part in self.parts:
            part.add_to(basepoint, sign)

    def take_from(self, displacement: Tensor, divisor: float = 1.0) -> None:
        for part in self.parts:
            part.take_from(displacement, divisor)


@dataclass(frozen=True, slots=True)
class LowRankCodec:
    """See the module's head."""

    name: str = "lowrank"
    rank: int = limits.lowrank_default
    rest: TopkCodec = TopkCodec()
    basepoint_dtype: torch.dtype = torch.int32

    def is_factored(self, segment: Segment) -> bool:
        """Which way a segment goes."""
        return 2 * self.rank * (segment.rows + segment.cols) <= segment.rows * segment.cols

    def max_payload_bytes(self, chunk: Chunk) -> int:
        factored, others = self._ways(chunk)
        most = self.rest.max_payload_bytes(factored) if factored.segments else 0
        return self._factor_bytes(factored.segments) + INT8.payload_bytes(others) + most

    def encode(self, displacement: Tensor, chunk: Chunk, coefficient: float, memory: CodecMemory | None = None) -> bytes:
        factored, others = self._ways(chunk)
        grid = codec_grid.write(INT8, displacement, chunk, others, coefficient)
        if not factored.segments:
            return grid
        factors = self._write_factors(displacement, factored, coefficient, memory or CodecMemory())
        left = displacement.clone()
        self._read_factors(factors, factored).take_from(left, coefficient)
        return factors + grid + self.rest.encode(left, factored, coefficient)

    def open(self, payload: bytes, chunk: Chunk) -> LowRankDelta:
        factored, others = self._ways(chunk)
        if not factored.segments:
            grid = codec_grid.read(INT8, payload, chunk, others)
            return LowRankDelta((grid,), grid.largest_step)
        first = self._factor_bytes(factored.segments)
        second = first + INT8.payload_bytes(others)
        if len(payload) < second:
            raise refuse("packet-truncated", f"a payload of {len(payload)} bytes ends before its {second} bytes of factors and codes do")
        factors = self._read_factors(payload[:first], factored)
        rest = self.rest.open(payload[second:], factored)
        grid = codec_grid.read(INT8, payload[first:second], chunk, others)
        return LowRankDelta((grid, factors, rest), max(grid.largest_step, factors.largest_step + rest.largest_step))

    def _ways(self, chunk: Chunk) -> tuple[Chunk, tuple[Segment, ...]]:
        """The chunk with its factored segments alone; the others."""
        factored = tuple(s for s in chunk.segments if self.is_factored(s))
        return replace(chunk, segments=factored), tuple(s for s in chunk.segments if not self.is_factored(s))

    def _factor_bytes(self, segments: Sequence[Segment]) -> int:
        return sum(1 + self.rank * (s.rows + s.cols) for s in segments)

    # -- factors -------------------------------------------------------------------------------------------------------

    def _write_factors(self, displacement: Tensor, factored: Chunk, coefficient: float, memory: CodecMemory) -> bytes:
        exponents, factors = [], []
        for at, s in enumerate(factored.segments):
            matrix = s.matrix(displacement)
            warm = self._start(matrix, at, memory)
            p, q, exponent = delta_lowrank.encode_unchecked(matrix, coefficient, s.unit_exponent, warm)
            exponents.append(exponent)
            factors += [p.reshape(-1), q.reshape(-1)]
        powers, codes = host_array(exponents), host_array(factors)
        if bool((powers < lowrank_min_exponent).any()):
            raise not_finite(factored)
        pairs = self._pairs(torch.from_numpy(codes), factored.segments)
        for at, (p, q) in enumerate(pairs):
            # Of a diverged run: a smaller multiple of the same product, which shrinks the displacement as well.
            while delta_lowrank.largest_step(p, q, torch.tensor(int(powers[at]))) > max_step:
                powers[at] -= 1
        return powers.astype(np.int8).tobytes() + codes.tobytes()

    def _start(self, matrix: Tensor, at: int, memory: CodecMemory) -> Tensor:
        """Where the iteration goes on; kept in the memory, which `encode_unchecked` brings up to date."""
        warm = memory.tensors.get(at)
        if warm is None or warm.device != matrix.device or warm.shape != (matrix.shape[1], self.rank):
            warm = delta_lowrank.start(matrix.shape[1], self.rank, matrix.device)
            for _ in range(limits.lowrank_first_iterations):
                delta_lowrank.refine(matrix, warm)
            memory.tensors[at] = warm
        return warm

    def _read_factors(self, payload: bytes, factored: Chunk) -> FactoredDelta:
        """Checked. The payload has the right size."""
        segments = factored.segments
        exponents = torch.from_numpy(np.frombuffer(payload, dtype=np.int8, count=len(segments)).astype(np.int32))
        codes = torch.from_numpy(np.frombuffer(payload, dtype=np.int8, offset=len(segments)).copy())
        pairs = self._pairs(codes, segments)
        largest = 0
        for at, (p, q) in enumerate(pairs):
            exponent = exponents[at : at + 1]
            where = f"segment {at} of chunk {factored.index}"
            if not bool(delta_lowrank.valid(p, q, exponent)):
                raise refuse("packet-payload", f"{where} has factors or an exponent that no encoder writes")
            largest = max(largest, delta_lowrank.largest_step(p, q, exponent))
            if largest > max_step:
                raise refuse("packet-scale", f"{where} has factors whose product may exceed {max_step} units")
        return FactoredDelta(segments, Placed(exponents, *(factor for pair in pairs for factor in pair)), largest)

    def _pairs(self, codes: Tensor, segments: Sequence[Segment]) -> list[tuple[Tensor, Tensor]]:
        """(P, Q) of each segment: views [rows, R] and [cols, R]."""
        sizes = [self.rank * size for s in segments for size in (s.rows, s.cols)]
        views = [part.view(-1, self.rank) for part in codes.split(sizes)]
        return list(zip(views[::2], views[1::2], strict=True))
