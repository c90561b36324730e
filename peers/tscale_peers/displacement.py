"""W = B + d: the arithmetic between weights, basepoint and displacement, on the device of the replica.

Enters: the replica, the trainer's live weights. Leaves: d of any chunks; weights written back.
Two ways to hold d, with one code:
    kept      d is a buffer of its own, 4 bytes per weight. It is captured anew (d = W - B) only after local steps.
    implied   nothing is stored: d is W - B whenever it is asked for, in scratch memory.
Implied, W is the truth. Then "d stays as it is when packets are received" holds up to the fp32 rounding of W = B + d, half a last place of
W for each reception that moves it; kept, to the bit. On the grid d must be kept: W holds more than B + d.
Consecutive chunks are handled together (`Span`), so that a GPU gets few launches. Units are powers of two, so one fused multiply-add gives
the bits of a product and a sum, and every device gives the same. Weights that live elsewhere are copied through, span by span.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from tscale_peers import limits
from tscale_peers.basepoint import Replica
from tscale_peers.layout import Chunk


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive chunks."""

    chunks: tuple[Chunk, ...]

    @property
    def start(self) -> int:
        return self.chunks[0].start

    @property
    def size(self) -> int:
        """Number of values."""
        return self.chunks[-1].stop - self.chunks[0].start

    def of(self, flat: Tensor) -> Tensor:
        """View of this span in a flat vector."""
        return flat[self.start : self.start + self.size]

    def part(self, chunk: Chunk, values: Tensor) -> Tensor:
        """View of one chunk in this span's values."""
        return values[chunk.start - self.start : chunk.stop - self.start]

    def units(self) -> list[tuple[int, int, float]]:
        """(first value, last value + 1, unit) of stretches of this span with one unit."""
        pieces = [(chunk.start - self.start, s) for chunk in self.chunks for s in chunk.segments]
        merged: list[tuple[int, int, float]] = []
        for offset, s in pieces:
            if merged and merged[-1][2] == s.unit:
                merged[-1] = (merged[-1][0], offset + s.stop, s.unit)
            else:
                merged.append((offset + s.start, offset + s.stop, s.unit))
        return merged


def spans_of(chunks: Iterable[Chunk], most_values: int) -> list[Span]:
    """Consecutive chunks together, as far as they fit in `most_values`; chunks ascending."""
    spans: list[list[Chunk]] = []
    for chunk in chunks:
        last = spans[-1] if spans else []
        if last and last[-1].index + 1 == chunk.index and chunk.stop - last[0].start <= most_values:
            last.append(chunk)
        else:
            spans.append([chunk])
    return [Span(tuple(span)) for span in spans]


class Displacement:
    """See the module's head.

    weights: flat [layout.size], fp32 or fp64, any device, live. saved: d as it was, taken over where it is kept; None: 0. grid: rounded to
    multiples of each unit, at most 2**24 of them.
    """

    def __init__(self, replica: Replica, weights: Tensor, saved: Tensor | None, *, kept: bool, grid: bool) -> None:
        self._replica = replica
        self._weights = weights.detach()
        self._grid = grid
        self._chunks = replica.layout.chunks
        self._stale = [False] * len(self._chunks)
        largest = max(chunk.size for chunk in self._chunks)
        self._most = min(replica.layout.size, max(largest, limits.span_values if replica.device.type != "cpu" else 0))
        pinned = replica.device.type == "cpu" and weights.device.type == "cuda"
        self._direct = weights.device == replica.device and weights.dtype == torch.float32 and replica.basepoint.dtype == torch.int32
        """One operation takes integers and weights at once."""
        self._values = None if self._direct and not grid else self._empty(pinned)
        self._room = None if kept else self._empty(pinned)
        self._d: Tensor | None = None
        if kept:
            start = torch.zeros(replica.layout.size, dtype=weights.dtype) if saved is None else saved
            self._d = start.to(replica.device)

    @property
    def kept(self) -> bool:
        return self._d is not None

    def spans(self, chunks: Iterable[Chunk] | None = None) -> list[Span]:
        """All chunks, or these (ascending), in spans that scratch memory holds."""
        return spans_of(self._chunks if chunks is None else chunks, self._most)

    def mark_trained(self) -> None:
        """The weights have moved by local steps."""
        self._stale = [True] * len(self._chunks)

    @torch.no_grad()
    def capture(self, span: Span, out: Tensor | None = None) -> Tensor:
        """d of a span after taking in local steps, on the replica's device: the live buffer where d is kept, else valid until the next
        call. out: where to put a copy instead."""
        if self._d is None:
            d = self._room_for(span) if out is None else out
            self._subtract(span, d)
            return d
        d = span.of(self._d)
        for stale, chunks in groupby(span.chunks, key=lambda chunk: self._stale[chunk.index]):
            if stale:
                run = Span(tuple(chunks))
                self._subtract(run, run.of(self._d))
                for chunk in run.chunks:
                    self._stale[chunk.index] = False
        return d if out is None else out.copy_(d)

    @torch.no_grad()
    def remainder(self, span: Span, d: Tensor) -> Tensor | None:
        """What W holds beyond B + d: on the grid; otherwise nothing."""
        if not self._grid:
            return None
        held = self._basepoint(span).add_(d)
        return span.of(self._weights).to(held.device, copy=True).sub_(held)

    @torch.no_grad()
    def write(self, span: Span, d: Tensor, rest: Tensor | None, chunks: Sequence[Chunk] | None = None) -> None:
        """W = B + d, and what d does not hold. chunks: those of the span that have moved (default: all)."""
        for run in spans_of(span.chunks if chunks is None else chunks, self._most):
            first = run.start - span.start
            moved = d[first : first + run.size]
            weights, basepoint = run.of(self._weights), run.of(self._replica.basepoint)
            if self._direct and rest is None:
                for start, stop, unit in run.units():
                    torch.add(moved[start:stop], basepoint[start:stop], alpha=unit, out=weights[start:stop])
                continue
            w = self._basepoint(run).add_(moved)
            if rest is not None:
                w.add_(rest[first : first + run.size])
            weights.copy_(w)

    def write_all(self) -> None:
        """W = B + d everywhere, where d is kept as it stands, else W = B."""
        for span in self.spans():
            self.write(span, span.of(self._d) if self._d is not None else self._room_for(span).zero_(), None)

    @torch.no_grad()
    def replace(self, span: Span, d: Tensor) -> None:
        """d of a span, on any device, and W = B + d."""
        target = span.of(self._d) if self._d is not None else self._room_for(span)
        target.copy_(d)
        for chunk in span.chunks:
            self._stale[chunk.index] = False
        self.write(span, target, None)

    def flat(self) -> Tensor:
        """d on the CPU: the live buffer if it is kept there, else a copy."""
        if self._d is not None and self._d.device.type == "cpu":
            for span in self.spans():
                self.capture(span)
            return self._d
        flat = torch.empty(self._replica.layout.size, dtype=self._weights.dtype)
        for span in self.spans():
            span.of(flat).copy_(self.capture(span))
        return flat

    def norm(self) -> float:
        """Euclidean norm of d."""
        squares = torch.zeros((), dtype=torch.float64, device=self._replica.device)
        for span in self.spans():
            squares += torch.linalg.vector_norm(self.capture(span), dtype=torch.float64) ** 2
        return math.sqrt(float(squares))

    def _subtract(self, span: Span, out: Tensor) -> None:
        weights, basepoint = span.of(self._weights), span.of(self._replica.basepoint)
        if self._direct:
            for start, stop, unit in span.units():
                torch.sub(weights[start:stop], basepoint[start:stop], alpha=unit, out=out[start:stop])
        else:
            out.copy_(weights).sub_(self._basepoint(span))
        if self._grid:
            most = limits.grid_displacement_units
            for start, stop, unit in span.units():
                out[start:stop].div_(unit).round_().clamp_(-most, most).mul_(unit)

    def _basepoint(self, span: Span) -> Tensor:
        """B in weight units, in scratch memory: valid until the next call."""
        assert self._values is not None
        values = self._values[: span.size].copy_(span.of(self._replica.basepoint))
        for start, stop, unit in span.units():
            values[start:stop].mul_(unit)
        return values

    def _room_for(self, span: Span) -> Tensor:
        assert self._room is not None
        return self._room[: span.size]

    def _empty(self, pinned: bool) -> Tensor:
        return torch.empty(self._most, dtype=self._weights.dtype, device=self._replica.device, pin_memory=pinned)
