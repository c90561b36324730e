"""Packing: the fp32 weights of a whole model to codes, transposed codes and units, in the order that the matrix kernels read.

    unit = sqrt(mean of W^2) / weight_scale             one per matrix, or per segment of a joined matrix (query, key, gate, value)
    codes[r, c] = encode(W[row_map[r], column_map[c]] * (1 / unit))         0 where the unit is 0
    transposed codes[c, r] = codes[r, c]
Every step from the weights to the codes is one fp32 operation with one rounding, and the mean is a sum that has no order (flat_blocks.py), so
all machines make the same codes of the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_kernels.codes import encode, weight_scale
from tscale_kernels.dispatch import BackendName
from tscale_kernels.flat_blocks import Span, block_table, ref_block_squares

TILE = 128
"""Rows and columns of the tiles that are packed at once."""


@dataclass(frozen=True)
class PackMatrix:
    """One matrix: its place in the flat weights and the order in which kernels read it.

    start, rows, columns   W [rows, columns] is flat[start : start + rows * columns]; columns is a multiple of 128
    row_map, column_map    int64 [rows], [columns]: row and column of W that stand at each place of the codes; None = as they are
    segments               equal parts of the rows with a unit each; row_map stays within segments
    transposed             whether transposed codes are made
    """

    start: int
    rows: int
    columns: int
    row_map: Tensor | None = None
    column_map: Tensor | None = None
    segments: int = 1
    transposed: bool = True

    @property
    def padded_rows(self) -> int:
        """Rows of the codes: rounded up to 128, the additional ones are zero."""
        return -(-self.rows // TILE) * TILE

    @property
    def spans(self) -> list[Span]:
        """The flat elements of every segment."""
        each = self.rows // self.segments * self.columns
        return [Span(self.start + i * each, each) for i in range(self.segments)]


class PackPlan:
    """Where everything of a list of matrices is packed to, and the tables that the kernels read on `device`.

    elements, transposed_elements   lengths of the flat code buffers
    units                           number of units: segments of all matrices
    blocks                          length of the buffer of square sums
    Raises ValueError for columns that are not multiples of 128, and for segments that do not fit the rows.
    """

    def __init__(self, matrices: Sequence[PackMatrix], device: torch.device | str) -> None:
        self.matrices = list(matrices)
        self.device = torch.device(device)
        self.code_starts, self.transposed_starts, self.unit_starts = [], [], []
        self.elements = self.transposed_elements = self.units = 0
        for matrix in self.matrices:
            if matrix.columns % TILE or matrix.rows % matrix.segments or (matrix.segments > 1 and matrix.rows // matrix.segments % TILE):
                raise ValueError(f"a matrix of {matrix.rows} x {matrix.columns} in {matrix.segments} segments cannot be packed in tiles of {TILE}")
            self.code_starts.append(self.elements)
            self.transposed_starts.append(self.transposed_elements)
            self.unit_starts.append(self.units)
            size = matrix.padded_rows * matrix.columns
            self.elements += size
            self.transposed_elements += size if matrix.transposed else 0
            self.units += matrix.segments
        self.spans = [span for matrix in self.matrices for span in matrix.spans]
        self.block_table = block_table(self.spans, device)

    @property
    def blocks(self) -> int:
        return self.block_table.shape[0]

    def codes_of(self, codes: Tensor, index: int) -> Tensor:
        """View [padded rows, columns] of matrix `index` in the flat codes."""
        matrix, start = self.matrices[index], self.code_starts[index]
        return codes[start : start + matrix.padded_rows * matrix.columns].view(matrix.padded_rows, matrix.columns)

    def transposed_of(self, codes_t: Tensor, index: int) -> Tensor:
        """View [columns, padded rows] of matrix `index` in the flat transposed codes. Raises ValueError if it has none."""
        matrix, start = self.matrices[index], self.transposed_starts[index]
        if not matrix.transposed:
            raise ValueError(f"matrix {index} is packed without transposed codes")
        return codes_t[start : start + matrix.padded_rows * matrix.columns].view(matrix.columns, matrix.padded_rows)

    def units_of(self, units: Tensor, index: int) -> Tensor:
        """View [segments] of matrix `index` in the units."""
        return units[self.unit_starts[index] : self.unit_starts[index] + self.matrices[index].segments]


# -- reference ---------------------------------------------------------------------------------------------------------


def ref_pack_weights(
    flat: Tensor, plan: PackPlan, *, codes: Tensor, codes_t: Tensor, units: Tensor, square_sums: Tensor, sums_known: bool = False
) -> None:
    """See `pack_weights`."""
    if not sums_known:
        square_sums.copy_(ref_block_squares(flat, plan.spans))
    first = 0
    for index, span in enumerate(plan.spans):
        mean = square_sums[first : first + span.blocks].sum().float() / float(span.elements)
        units[index] = mean.sqrt() * (1.0 / weight_scale(codes.dtype))
        first += span.blocks
    for index, matrix in enumerate(plan.matrices):
        unit = plan.units_of(units, index)
        inverse = torch.where(unit > 0, 1.0 / unit, 0.0).repeat_interleave(matrix.rows // matrix.segments)
        weights = flat[matrix.start : matrix.start + matrix.rows * matrix.columns].view(matrix.rows, matrix.columns)
        if matrix.row_map is not None:
            weights = weights[matrix.row_map.to(flat.device)]
        if matrix.column_map is not None:
            weights = weights[:, matrix.column_map.to(flat.device)]
        packed = plan.codes_of(codes, index)
        packed[: matrix.rows] = encode(weights * inverse[:, None], codes.dtype)
        packed[matrix.rows :].zero_()
        if matrix.transposed:
            plan.transposed_of(codes_t, index).copy_(packed.T)


# -- run ---------------------------------------------------------------------------------------------------------------


def pack_weights(
    flat: Tensor, plan: PackPlan, *, codes: Tensor, codes_t: Tensor, units: Tensor, square_sums: Tensor, sums_known: bool = False,
    backend: BackendName | None = None,
) -> None:  # fmt: skip
    """Pack all matrices of the plan.

    flat: fp32 [P]. codes: code dtype [plan.elements]. codes_t: same dtype [plan.transposed_elements]. units: fp32 [plan.units].
    square_sums: fp64 [plan.blocks], sums of squares of the plan's blocks: written, or with sums_known=True read (`optimizer_step` leaves them,
    which saves a pass over the weights; wrong as soon as somebody else changes a weight). Raises ValueError where lengths do not match.
    """
    lengths = (codes.numel(), codes_t.numel(), units.numel(), square_sums.numel())
    if lengths != (plan.elements, plan.transposed_elements, plan.units, plan.blocks) or codes.dtype != codes_t.dtype:
        raise ValueError(f"buffers of {lengths} elements do not fit the plan: {plan.elements}, {plan.transposed_elements}, {plan.units}, {plan.blocks}")
    ref_pack_weights(flat, plan, codes=codes, codes_t=codes_t, units=units, square_sums=square_sums, sums_known=sums_known)
