"""Which matrices an optimizer step updates: tables that `optimizer_step` reads on the device, and its scratch.

Enters: a list of matrices of the flat buffers. Leaves: an `UpdatePlan`, built once per optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_kernels.flat_blocks import GROUP, Span, block_table

BLOCK_COLUMNS, ROW_COLUMNS, MATRIX_COLUMNS = 5, 5, 6
"""Numbers per row of the tables."""
_ONE_MOMENT = 2**31 - 1
"""Groups per moment of a matrix with a single one."""


@dataclass(frozen=True)
class UpdateMatrix:
    """One matrix: flat[start : start + rows * columns], columns and start multiples of 128.

    per_row   one second moment per row instead of one in all
    sums      (first, count) of its part of `square_sums`, if the gradient kernel leaves sums of squares; None: they are made here
    """

    start: int
    rows: int
    columns: int
    per_row: bool = False
    sums: tuple[int, int] | None = None

    @property
    def span(self) -> Span:
        return Span(self.start, self.rows * self.columns)

    @property
    def moments(self) -> int:
        return self.rows if self.per_row else 1


class UpdatePlan:
    """Tables and scratch of a list of matrices on `device`; one step at a time uses it.

    moments         length of `moment_sums`: matrices and rows, in order
    blocks          length of `weight_squares`: blocks of all matrices, in order (flat_blocks.py)
    end             the flat buffers are at least this long
    row_table       int64 [n, 5], of `rows_at_once` rows each: first element, rows, columns, first moment, matrix
    unsummed_table  blocks of the matrices whose sums of squares are made here
    matrix_table    int64 [n, 6]: 1 if sums are given, first sum, number of sums, elements, moment, matrix; of matrices with one moment
    update_table    int64 [blocks, 5]: first element, groups, first group in its matrix, groups per moment, first moment

    Raises ValueError for columns that are not multiples of 128, matrices of 2**31 elements, and given sums of a matrix with per_row.
    """

    rows_at_once = 8

    def __init__(self, matrices: Sequence[UpdateMatrix], device: torch.device | str) -> None:
        self.matrices = list(matrices)
        self.moment_starts: list[int] = []
        self.moments = 0
        for index, matrix in enumerate(self.matrices):
            _check(index, matrix)
            self.moment_starts.append(self.moments)
            self.moments += matrix.moments
        self.end = max((matrix.span.start + matrix.span.elements for matrix in self.matrices), default=0)
        self.row_table = torch.cat([_empty(ROW_COLUMNS), *map(self._rows, self._indices(True))]).to(device)
        unsummed = [matrix.span for matrix in self.matrices if not matrix.per_row and matrix.sums is None]
        self.unsummed_table = block_table(unsummed).to(device)
        self.matrix_table = self._matrix_table().to(device)
        self.update_table = torch.cat([_empty(BLOCK_COLUMNS), *map(self._blocks, range(len(self.matrices)))]).to(device)
        self.blocks = self.update_table.shape[0]
        self.own_sums = torch.zeros(self.unsummed_table.shape[0], dtype=torch.float64, device=device)
        self.mean_squares = torch.zeros(self.moments, device=device)
        self.multipliers = torch.zeros(self.moments, device=device)

    def moments_of(self, moments: Tensor, index: int) -> Tensor:
        """View [rows] or [1] of matrix `index` in a tensor of `moments` elements."""
        return moments[self.moment_starts[index] : self.moment_starts[index] + self.matrices[index].moments]

    def _indices(self, per_row: bool) -> list[int]:
        return [index for index, matrix in enumerate(self.matrices) if matrix.per_row == per_row]

    def _rows(self, index: int) -> Tensor:
        matrix = self.matrices[index]
        first = torch.arange(0, matrix.rows, self.rows_at_once)
        rows = (matrix.rows - first).clamp(max=self.rows_at_once)
        return _columns(matrix.start + first * matrix.columns, rows, matrix.columns, self.moment_starts[index] + first, index)

    def _matrix_table(self) -> Tensor:
        rows, own = [], 0
        for index in self._indices(False):
            matrix = self.matrices[index]
            sums = matrix.sums or (own, matrix.span.blocks)
            own += 0 if matrix.sums else matrix.span.blocks
            rows.append([int(matrix.sums is not None), *sums, matrix.span.elements, self.moment_starts[index], index])
        return torch.tensor(rows, dtype=torch.int64).view(-1, MATRIX_COLUMNS)

    def _blocks(self, index: int) -> Tensor:
        matrix = self.matrices[index]
        start, groups, first = block_table([matrix.span]).unbind(1)
        return _columns(start, groups, first, matrix.columns // GROUP if matrix.per_row else _ONE_MOMENT, self.moment_starts[index])


def _check(index: int, matrix: UpdateMatrix) -> None:
    if matrix.columns % GROUP or matrix.span.elements >= 2**31:
        raise ValueError(f"matrix {index} of {matrix.rows} x {matrix.columns}: columns must be a multiple of {GROUP}, elements below 2**31")
    if matrix.per_row and matrix.sums is not None:
        raise ValueError(f"matrix {index} has a second moment per row; sums of the whole matrix are of no use")


def _columns(*numbers: Tensor | int) -> Tensor:
    """int64 [n, len(numbers)]; the first is a tensor."""
    assert isinstance(numbers[0], Tensor)
    return torch.stack([torch.as_tensor(number, dtype=torch.int64).expand_as(numbers[0]) for number in numbers], 1)


def _empty(columns: int) -> Tensor:
    return torch.empty(0, columns, dtype=torch.int64)
