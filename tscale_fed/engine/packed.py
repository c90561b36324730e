"""Packed weights: the codes of all matrices as kernels read them, made anew from the fp32 weights before every step.

The fp32 weights stay where they are: the swarm changes them between steps, the optimizer at the end of one. The embedding is not packed: it
is read in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_fed.engine.kernel_order import PROJECTIONS, joined_rows
from tscale_fed.model.combiner import blocked_columns
from tscale_fed.model.shape import ModelShape
from tscale_kernels.dispatch import BackendName
from tscale_kernels.pack_weights import PackMatrix, PackPlan, pack_weights

PER_LAYER = 4
"""Packed matrices of a layer: joined projection, combiner, ffn_up, ffn_down."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One packed matrix: codes [out, in], transposed codes [in, out] (None for evaluation and for the final layer), units [segments]."""

    codes: Tensor
    codes_t: Tensor | None
    units: Tensor

    @property
    def transposed(self) -> Tensor:
        assert self.codes_t is not None, "packed without transposed codes"
        return self.codes_t


@dataclass(frozen=True, slots=True)
class LayerMatrices:
    """The packed matrices of a layer."""

    projection: Matrix
    combiner: Matrix
    ffn_up: Matrix
    ffn_down: Matrix


class PackedWeights:
    """Buffers of the codes of one model on one device; `units` fp32 of all matrices and segments. Raises torch.OutOfMemoryError."""

    def __init__(self, shape: ModelShape, code: torch.dtype, device: torch.device, *, transposed: bool) -> None:
        self.plan = PackPlan(pack_matrices(shape, transposed=transposed), device)
        plan = self.plan
        self._codes = torch.empty(plan.elements, dtype=code, device=device)
        self._codes_t = torch.empty(plan.transposed_elements, dtype=code, device=device)
        self.units = torch.zeros(plan.units, dtype=torch.float32, device=device)
        self.square_sums = torch.zeros(plan.blocks, dtype=torch.float64, device=device)
        """Of the weights, block by block; whoever changes the weights may write the new sums (a view of) here, see `pack`."""
        matrices = [self._matrix(index) for index in range(len(plan.matrices))]
        self.final = matrices[0]
        self.layers = [LayerMatrices(*matrices[first : first + PER_LAYER]) for first in range(1, len(matrices), PER_LAYER)]

    def pack(self, flat: Tensor, backend: BackendName | None = None, squares_known: bool = False) -> None:
        """Codes of the weights `flat`, fp32 [parameters] on the same device. squares_known: `square_sums` are those of `flat`."""
        pack_weights(
            flat, self.plan, codes=self._codes, codes_t=self._codes_t, units=self.units, square_sums=self.square_sums,
            sums_known=squares_known, backend=backend,
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        """Of all buffers."""
        return sum(each.numel() * each.element_size() for each in (self._codes, self._codes_t, self.units, self.square_sums))

    def _matrix(self, index: int) -> Matrix:
        transposed = self.plan.transposed_of(self._codes_t, index) if self.plan.matrices[index].transposed else None
        return Matrix(self.plan.codes_of(self._codes, index), transposed, self.plan.units_of(self.units, index))


def pack_matrices(shape: ModelShape, *, transposed: bool) -> list[PackMatrix]:
    """The final layer, then four matrices per layer, bottom first."""
    rows, columns = joined_rows(shape.heads), blocked_columns(shape.heads)
    starts, sizes, start = {}, {}, 0
    for name, height, width in shape.tensors():
        starts[name], sizes[name] = start, (height, width)
        start += height * width
    matrices = [PackMatrix(starts["final"], *sizes["final"], transposed=False)]
    for layer in range(len(shape.layers())):
        prefix = f"layers.{layer}."
        query = prefix + PROJECTIONS[0]
        height, width = sizes[query]
        segments = len(PROJECTIONS)
        matrices += [
            PackMatrix(starts[query], segments * height, width, row_map=rows, segments=segments, transposed=transposed),
            PackMatrix(starts[prefix + "combiner"], *sizes[prefix + "combiner"], column_map=columns, transposed=transposed),
            PackMatrix(starts[prefix + "ffn_up"], *sizes[prefix + "ffn_up"], transposed=transposed),
            PackMatrix(starts[prefix + "ffn_down"], *sizes[prefix + "ffn_down"], transposed=transposed),
        ]
    return matrices


def packed_bytes(shape: ModelShape, code: torch.dtype, *, transposed: bool) -> int:
    """Bytes of `PackedWeights.bytes`, without making them."""
    plan = pack_matrices(shape, transposed=transposed)
    elements = sum(m.padded_rows * m.columns * (2 if m.transposed else 1) for m in plan)
    units, blocks = sum(m.segments for m in plan), sum(span.blocks for m in plan for span in m.spans)
    return elements * code.itemsize + 4 * units + 8 * blocks
