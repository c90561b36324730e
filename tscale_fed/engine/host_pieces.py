"""Pieces: what the host updates at a time, and where each piece's codes go on the device.

A piece is one matrix as kernels read it: the final layer, the joined projections of a layer, a combiner, ffn_up or ffn_down; and some rows
of the embedding, whose rows have nothing to do with each other, so that their way to the device overlaps the update of the next ones.
A piece has segments: matrices with a second moment and a unit of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_fed.engine.host_gradients import Stage, joined_shapes, stage_spans
from tscale_fed.engine.kernel_order import PROJECTIONS, joined_rows
from tscale_fed.engine.packed import Matrix, PackedWeights
from tscale_fed.model.combiner import blocked_columns
from tscale_fed.model.shape import ModelShape
from tscale_kernels.matmul_wgrad import square_sum_count

EMBEDDING_PIECES = 8
"""A guess: enough that copying the last one is short, few enough that all threads have work in each."""


@dataclass(frozen=True, slots=True)
class Segment:
    """flat[start : stop], [rows, columns]; moment_sums[moment : moment + moments]; square sums of its gradient, in their flat buffer."""

    name: str
    start: int
    stop: int
    columns: int
    moment: int
    moments: int
    sums: tuple[int, int] | None
    """(first, count); None: rows have moments of their own, from the gradient itself."""

    @property
    def elements(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """flat[start : stop] as [rows, columns] in canonical order."""

    segments: tuple[Segment, ...]
    rows: int
    columns: int
    matrix: Matrix | None = None
    """Where codes go; None for the embedding, whose fp32 rows go to `table`."""
    table: Tensor | None = None
    row_map: Tensor | None = None
    column_map: Tensor | None = None
    unit: int = 0
    """Place of the first segment's unit among all units."""

    @property
    def start(self) -> int:
        return self.segments[0].start

    @property
    def stop(self) -> int:
        return self.segments[-1].stop


def build_pieces(shape: ModelShape, weights: PackedWeights, table: Tensor) -> dict[Stage, list[Piece]]:
    """All pieces of a model, by the stage of the backward pass that leaves their gradient. table: fp32 [rows, E] on the device."""
    device, heads = table.device, shape.heads
    row_map, column_map = (each.to(device, torch.int32) for each in (joined_rows(heads), blocked_columns(heads)))
    pieces: dict[Stage, list[Piece]] = {"embedding": _embedding(shape, table), "final": [_final(shape, weights)]}
    moment, unit = shape.embedding_rows + shape.vocab, 1
    for layer, matrices in enumerate(weights.layers):
        span = stage_spans(shape)[layer]
        start, sums = span.start, span.first_sum
        parts = zip(
            ((*PROJECTIONS,), ("combiner",), ("ffn_up",), ("ffn_down",)),
            joined_shapes(shape),
            (matrices.projection, matrices.combiner, matrices.ffn_up, matrices.ffn_down),
            (row_map, None, None, None),
            (None, column_map, None, None),
            strict=True,
        )
        found = []
        for names, (rows, columns), matrix, rows_at, columns_at in parts:
            size, count = rows * columns // len(names), square_sum_count(rows, columns) // len(names)
            segments = []
            for i, name in enumerate(names):
                at = start + i * size
                segments.append(Segment(f"layers.{layer}.{name}", at, at + size, columns, moment + i, 1, (sums + i * count, count)))
            found.append(Piece(tuple(segments), rows, columns, matrix, None, rows_at, columns_at, unit))
            start, sums = start + rows * columns, sums + count * len(names)
            moment, unit = moment + len(names), unit + len(names)
        pieces[layer] = found[::-1]  # the order in which their gradients are made
    return pieces


def _embedding(shape: ModelShape, table: Tensor) -> list[Piece]:
    rows, columns = table.shape
    each = -(-rows // EMBEDDING_PIECES)
    pieces = []
    for first in range(0, rows, each):
        last = min(rows, first + each)
        segment = Segment("embedding", first * columns, last * columns, columns, first, last - first, None)
        pieces.append(Piece((segment,), last - first, columns, table=table[first:last]))
    return pieces


def _final(shape: ModelShape, weights: PackedWeights) -> Piece:
    start, columns = shape.embedding_rows * shape.width, shape.width
    segment = Segment("final", start, start + shape.vocab * columns, columns, shape.embedding_rows, shape.vocab, None)
    return Piece((segment,), shape.vocab, columns, weights.final)
