"""Where each tensor lies in the replica's one flat vector, and how that vector is cut into chunks.

Enters: a list of matrices in canonical order. Leaves: tensors' offsets; chunks of at most `chunk_params` values.
Rule: the flat vector is the tensors one after the other, row-major. A chunk is a contiguous slice made of whole rows: big tensors are cut
between rows, small ones share a chunk (unless their codecs differ). A packet carries one chunk, so a row and its scale always travel
together.
Each tensor has its own unit u = 2**unit_exponent, absolute and fixed in the manifest: the basepoint holds integer multiples of it. It must
be far finer than one step of the swarm, so that rounding stays below the one-bit error, and coarse enough that weights fit 2**30 units.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, get_args

import msgspec
from torch import Tensor

from tscale_peers.errors import refuse

TensorClass = Literal["embedding", "final", "matrix"]
"""A tensor is of the class of its name if there is one, else "matrix"."""
TENSOR_CLASSES: tuple[TensorClass, ...] = get_args(TensorClass)


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One matrix [rows, cols] of the model; vectors are [1, cols]. Basepoint values are multiples of 2**unit_exponent."""

    name: str
    rows: int
    cols: int
    unit_exponent: int

    @property
    def size(self) -> int:
        """Number of values."""
        return self.rows * self.cols

    @property
    def tensor_class(self) -> TensorClass:
        """What a run may choose a codec by."""
        if self.name == "embedding":
            return "embedding"
        return "final" if self.name == "final" else "matrix"


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of one tensor inside one chunk. `start` counts values from the chunk's beginning, `row` rows of the chunk."""

    tensor: int
    first_row: int
    rows: int
    cols: int
    unit_exponent: int
    start: int
    row: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.cols

    @property
    def unit(self) -> float:
        return math.ldexp(1.0, self.unit_exponent)

    def matrix(self, chunk_values: Tensor) -> Tensor:
        """View [rows, cols] of this segment in the chunk's flat values."""
        return chunk_values[self.start : self.stop].view(self.rows, self.cols)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Values start..stop of the flat vector: `rows` whole rows of one or more tensors."""

    index: int
    start: int
    stop: int
    rows: int
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return self.stop - self.start

    def of(self, flat: Tensor) -> Tensor:
        """View of this chunk in a flat vector."""
        return flat[self.start : self.stop]


@dataclass(frozen=True)
class Layout:
    """Immutable. `build` it from the manifest's tensors."""

    specs: tuple[TensorSpec, ...]
    chunks: tuple[Chunk, ...]

    @staticmethod
    def build(specs: Sequence[TensorSpec], chunk_params: int, codecs: Sequence[str] | None = None) -> Layout:
        """Cut the tensors, in the order given, into chunks of at most `chunk_params` values.

        codecs: the name of each tensor's codec; no chunk holds tensors of two. None: one codec for all.
        Raises Refused("bad-layout") naming the tensor.
        """
        for spec in specs:
            _check(spec, chunk_params)
        if not specs:
            raise refuse("bad-layout", "the run has no tensors")
        names = [""] * len(specs) if codecs is None else list(codecs)
        changes = {number for number, (before, name) in enumerate(pairwise(names), start=1) if name != before}
        return Layout(tuple(specs), tuple(_cut(specs, chunk_params, changes)))

    @cached_property
    def size(self) -> int:
        """Values in the flat vector."""
        return self.chunks[-1].stop

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts in the flat vector."""
        starts, at = [], 0
        for spec in self.specs:
            starts.append(at)
            at += spec.size
        return tuple(starts)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Named [rows, cols] views of a flat vector of `size` values."""
        return {spec.name: flat[at : at + spec.size].view(spec.rows, spec.cols) for spec, at in zip(self.specs, self.offsets, strict=True)}

    def tensors_of(self, chunk: Chunk) -> str:
        """Names of the tensors in a chunk, for people."""
        names = [self.specs[segment.tensor].name for segment in chunk.segments]
        return names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"


def _check(spec: TensorSpec, chunk_params: int) -> None:
    if spec.rows < 1 or spec.cols < 1 or spec.cols % 8:
        raise refuse("bad-layout", f"tensor {spec.name}: {spec.rows} x {spec.cols} must have rows, and columns that are a multiple of 8")
    if spec.cols > chunk_params:
        raise refuse("bad-layout", f"tensor {spec.name}: a row of {spec.cols} values does not fit in {chunk_params}; raise chunk_params")


def _cut(specs: Sequence[TensorSpec], chunk_params: int, changes: Container[int]) -> Iterable[Chunk]:
    """changes: numbers of the tensors that must open a chunk."""
    index = start = size = rows = 0
    segments: list[Segment] = []
    for number, spec in enumerate(specs):
        first = 0
        while first < spec.rows:
            fit = min(spec.rows - first, (chunk_params - size) // spec.cols)
            if fit == 0 or (first == 0 and size and number in changes):
                yield Chunk(index, start, start + size, rows, tuple(segments))
                index, start, size, rows, segments = index + 1, start + size, 0, 0, []
                continue
            segments.append(Segment(number, first, fit, spec.cols, spec.unit_exponent, size, rows))
            size += fit * spec.cols
            rows += fit
            first += fit
    yield Chunk(index, start, start + size, rows, tuple(segments))
