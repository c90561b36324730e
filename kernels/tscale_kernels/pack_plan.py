"""Where the matrices of a model are packed to: places in the code buffers, and the tables that `pack_weights` reads on the device.

Enters: a list of matrices with the order in which kernels read their rows and columns. Leaves: a `PackPlan`, built once per engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_kernels.flat_blocks import Span, block_table

TILE = 128
"""Rows and columns that are packed together."""
TILE_COLUMNS = 11
"""Numbers per tile in the tables of tiles."""
_LONGEST_RUN = 32


@dataclass(frozen=True, eq=False)
class PackMatrix:
    """One matrix: its place in the flat weights and the order in which kernels read it.

    start, rows, columns   W [rows, columns] is flat[start : start + rows * columns]; columns and start are multiples of 128
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
    """Places of a list of matrices in the code buffers, and tables on `device`.

    elements, transposed_elements   lengths of the flat code buffers
    units                           number of units: segments of all matrices
    blocks                          length of the buffer of square sums
    segment_table                   int64 [units, 3]: first block, blocks, elements
    plain_tiles, mapped_tiles       int64 [tiles, 11]: start of W, first row, first column, columns, rows, padded rows, unit, place in
                                    row_maps (-1: rows keep their order), start in the codes, start in the transposed codes (-1: none),
                                    place in column_maps; mapped: those whose columns change order
    row_maps                        int32, all row maps
    column_maps                     int32, of every map: columns of W in the order they are read, then where each goes. They are read tile
                                    by tile, in the order of where they go, so reads stay within a tile and writes come in runs
    run                             length of the aligned runs of consecutive places

    Raises ValueError for columns that are not multiples of 128, segments that do not fit the rows, and matrices of 2**31 elements.
    """

    def __init__(self, matrices: Sequence[PackMatrix], device: torch.device | str) -> None:
        self.matrices = list(matrices)
        self.device = torch.device(device)
        self.code_starts: list[int] = []
        self.transposed_starts: list[int] = []
        self.unit_starts: list[int] = []
        self.elements = self.transposed_elements = self.units = 0
        for matrix in self.matrices:
            self._place(matrix)
        self.spans = [span for matrix in self.matrices for span in matrix.spans]
        self.blocks = sum(span.blocks for span in self.spans)
        self.block_table = block_table(self.spans).to(device)
        self.segment_table = self._segments().to(device)
        self.run = _LONGEST_RUN
        self._build_tiles()

    def _place(self, matrix: PackMatrix) -> None:
        each = matrix.rows // matrix.segments
        if matrix.padded_rows * matrix.columns >= 2**31:
            raise ValueError(f"{matrix.rows} x {matrix.columns} is too large for one matrix: places within it are int32")
        if matrix.columns % TILE or matrix.rows % matrix.segments or (matrix.segments > 1 and each % TILE):
            raise ValueError(f"{matrix.rows} x {matrix.columns} in {matrix.segments} segments cannot be packed in tiles of {TILE}")
        self.code_starts.append(self.elements)
        self.transposed_starts.append(self.transposed_elements)
        self.unit_starts.append(self.units)
        size = matrix.padded_rows * matrix.columns
        self.elements += size
        self.transposed_elements += size if matrix.transposed else 0
        self.units += matrix.segments

    def _segments(self) -> Tensor:
        blocks = torch.tensor([span.blocks for span in self.spans], dtype=torch.int64)
        return torch.stack((blocks.cumsum(0) - blocks, blocks, torch.tensor([span.elements for span in self.spans], dtype=torch.int64)), 1)

    def _build_tiles(self) -> None:
        row_maps, column_maps = _Joined(), _Joined()
        plain, mapped = [torch.empty(0, TILE_COLUMNS, dtype=torch.int64)], [torch.empty(0, TILE_COLUMNS, dtype=torch.int64)]
        for index, matrix in enumerate(self.matrices):
            row_map = -1 if matrix.row_map is None else row_maps.add(matrix.row_map.cpu())
            if matrix.column_map is None:
                plain.append(self._tiles_of(index, row_map, -1))
                continue
            places = _sorted_places(matrix.column_map.cpu())
            self.run = min(self.run, _run(places))
            column_map = column_maps.add(torch.cat((matrix.column_map.cpu()[places], places)))
            mapped.append(self._tiles_of(index, row_map, column_map))
        self.plain_tiles, self.mapped_tiles = torch.cat(plain).to(self.device), torch.cat(mapped).to(self.device)
        self.row_maps, self.column_maps = row_maps.tensor(self.device), column_maps.tensor(self.device)

    def _tiles_of(self, index: int, row_map: int, column_map: int) -> Tensor:
        matrix = self.matrices[index]
        rows, columns = torch.meshgrid(torch.arange(0, matrix.padded_rows, TILE), torch.arange(0, matrix.columns, TILE), indexing="ij")
        row, column = rows.reshape(-1), columns.reshape(-1)
        unit = self.unit_starts[index] + row // (matrix.padded_rows // matrix.segments)
        transposed = self.transposed_starts[index] if matrix.transposed else -1
        numbers = (
            matrix.start, row, column, matrix.columns, matrix.rows, matrix.padded_rows, unit, row_map,
            self.code_starts[index], transposed, column_map,
        )  # fmt: skip
        return torch.stack([torch.as_tensor(number, dtype=torch.int64).expand_as(row) for number in numbers], 1)

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


class _Joined:
    """Index vectors on the CPU behind each other; equal ones are kept once."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.starts: dict[bytes, int] = {}
        self.length = 0

    def add(self, part: Tensor) -> int:
        """Place of the first element."""
        key = part.to(torch.int32).numpy().tobytes()
        if key not in self.starts:
            self.starts[key] = self.length
            self.parts.append(part.to(torch.int32))
            self.length += part.numel()
        return self.starts[key]

    def tensor(self, device: torch.device) -> Tensor:
        return torch.cat([*self.parts, torch.zeros(TILE, dtype=torch.int32)]).to(device)


def _sorted_places(column_map: Tensor) -> Tensor:
    """For column_map [columns] (place -> column of W): the places of every tile of 128 columns of W, ascending within the tile."""
    places = torch.empty_like(column_map)
    places[column_map] = torch.arange(column_map.numel())
    return places.view(-1, TILE).sort(dim=1).values.reshape(-1)


def _run(places: Tensor) -> int:
    """The longest power of two such that all aligned stretches of that length are consecutive and start at a multiple of it."""
    run = _LONGEST_RUN
    while run > 1:
        stretches = places.view(-1, run)
        if bool((stretches[:, 0] % run == 0).all()) and bool((stretches == stretches[:, :1] + torch.arange(run)).all()):
            break
        run //= 2
    return run
