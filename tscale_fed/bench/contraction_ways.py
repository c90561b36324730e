"""Ways to send a displacement, and what they leave of one that grows: codecs of runs, and low rank with other remainders.

Enters: the name of a codec, or "lowrank-R only", "lowrank-R and sign"; moves (contraction_moves.py). Leaves: a `Result`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tscale_fed.bench.contraction_moves import Moves
from tscale_kernels import delta_lowrank, delta_onebit
from tscale_peers.codec import Codec, CodecMemory, codec_named
from tscale_peers.codec_lowrank import LowRankCodec
from tscale_peers.layout import Layout, TensorSpec

COEFFICIENT = 0.125
"""An equal share of 8 peers."""
UNIT_EXPONENT = -22
"""As runs have it (tscale_fed.new_run)."""
_PER_C = 2.0**UNIT_EXPONENT / COEFFICIENT
_STEP_BYTES = 2
LAST_MOVES = 4
"""What is kept is compared with the mean energy of so many moves, as that of one varies."""


class Way(Protocol):
    """One way to publish; remembers what its encoder does."""

    def publish(self, name: str, displacement: Tensor) -> int:
        """Take what is sent out of `displacement` [rows, cols], in place. Returns the payload's bytes."""
        ...


@dataclass
class CodecWay:
    """A codec of runs; every matrix is a chunk."""

    codec: Codec
    memories: dict[str, CodecMemory] = field(default_factory=dict)

    def publish(self, name: str, displacement: Tensor) -> int:
        rows, cols = displacement.shape
        chunk = Layout.build([TensorSpec(name, rows, cols, UNIT_EXPONENT)], rows * cols).chunks[0]
        flat = displacement.view(-1)
        payload = self.codec.encode(flat, chunk, COEFFICIENT, self.memories.setdefault(name, CodecMemory()))
        self.codec.open(payload, chunk).take_from(flat, COEFFICIENT)
        return len(payload)


@dataclass
class FactorsWay:
    """Factors, and nothing or the signs of what they leave."""

    rank: int
    with_signs: bool
    starts: dict[str, Tensor] = field(default_factory=dict)

    def publish(self, name: str, displacement: Tensor) -> int:
        warm = self.starts.get(name)
        if warm is None:
            warm = self.starts[name] = delta_lowrank.start(displacement.shape[1], self.rank)
            for _ in range(2):
                delta_lowrank.refine(displacement, warm)
        p, q, exponent = delta_lowrank.encode(displacement, COEFFICIENT, UNIT_EXPONENT, warm)
        delta_lowrank.leak(displacement, p, q, exponent, _PER_C)
        size = p.numel() + q.numel() + 1
        if self.with_signs:
            bits, steps = delta_onebit.encode(displacement, COEFFICIENT, UNIT_EXPONENT)
            delta_onebit.leak(displacement, bits, steps.float() * _PER_C)
            size += bits.numel() + _STEP_BYTES * steps.numel()
        return size


def way_named(name: str) -> Way:
    """A fresh way. Raises Refused("packet-codec")."""
    for end in (" only", " and sign"):
        if name.endswith(end):
            codec = codec_named(name.removesuffix(end))
            if isinstance(codec, LowRankCodec):
                return FactorsWay(codec.rank, end == " and sign")
    return CodecWay(codec_named(name))


@dataclass(frozen=True, slots=True)
class Result:
    """sent_first: part of ||d||^2 that the first publication sends. kept_last: ||d||^2 after the last one, in those of a move."""

    bytes_per_parameter: float
    sent_first: float
    kept_last: float

    def values(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def measure(way: Way, moves: Moves) -> Result:
    """Publish after every move. The moves stay as they are."""
    d = {name: torch.zeros_like(move) for name, move in moves[0].items()}
    sent_first, size = 0.0, 0
    for number, move in enumerate(moves):
        for name, values in move.items():
            d[name] += values
        before = _energy(d)
        size += sum(way.publish(name, values) for name, values in d.items())
        if number == 0:
            sent_first = 1.0 - _energy(d) / before
    last = moves[-LAST_MOVES:]
    parameters = sum(values.numel() for values in d.values())
    return Result(size / len(moves) / parameters, sent_first, _energy(d) / (sum(_energy(move) for move in last) / len(last)))


def _energy(tensors: dict[str, Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 for tensor in tensors.values())
