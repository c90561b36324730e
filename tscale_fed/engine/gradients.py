"""The gradient side: where each matrix's gradient goes in the flat buffer, and where the sums of its squares are kept for the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tscale_fed.engine.kernel_order import PROJECTIONS, joined_rows
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import ROW_NORMALISED
from tscale_kernels.matmul_wgrad import square_sum_count, workspace_size
from tscale_kernels.optimizer_step import UpdateMatrix


@dataclass(frozen=True, slots=True)
class MatrixGradient:
    """One matrix, or the joined projections."""

    grad: Tensor
    """fp32 [out, in], a view of the flat gradient, canonical order."""
    square_sums: Tensor
    row_map: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerGradients:
    projection: MatrixGradient
    combiner: MatrixGradient
    ffn_up: MatrixGradient
    ffn_down: MatrixGradient


class WeightGradients(Protocol):
    """What the backward pass writes to."""

    embedding: Tensor
    """fp32 [rows, E], added to."""
    final: Tensor
    """fp32 [V, E], added to."""
    layers: list[LayerGradients]
    workspace: Tensor


class Gradients:
    """Views of `parameters.flat_grad`, and scratch of the weight gradients."""

    def __init__(self, shape: ModelShape, parameters: Parameters) -> None:
        device = parameters.device
        self.embedding, self.final = parameters.grads["embedding"], parameters.grads["final"]
        self.square_sums = torch.zeros(square_sums_needed(shape), device=device)
        self.workspace = torch.zeros(workspace_needed(shape), dtype=torch.int32, device=device)
        self._next = 0
        rows = joined_rows(shape.heads).to(device, torch.int32)
        self.layers = [self._layer(parameters, f"layers.{layer}.", rows) for layer in range(len(shape.layers()))]

    def _layer(self, parameters: Parameters, prefix: str, rows: Tensor) -> LayerGradients:
        first, last = (parameters.spans[prefix + PROJECTIONS[i]] for i in (0, -1))
        joined = parameters.flat_grad[first[0] : last[1]].view(rows.numel(), -1)
        names = ("combiner", "ffn_up", "ffn_down")
        return LayerGradients(self._matrix(joined, rows), *(self._matrix(parameters.grads[prefix + name]) for name in names))

    def _matrix(self, grad: Tensor, row_map: Tensor | None = None) -> MatrixGradient:
        count = square_sum_count(*grad.shape)
        sums = self.square_sums[self._next : self._next + count]
        self._next += count
        return MatrixGradient(grad, sums, row_map)


def square_sums_needed(shape: ModelShape) -> int:
    """Elements of `Gradients.square_sums`: all matrices but the embedding and the final layer."""
    return sum(square_sum_count(rows, columns) for _, rows, columns in shape.tensors()[2:])


def workspace_needed(shape: ModelShape) -> int:
    """Elements of `Gradients.workspace`: the largest weight gradient of a layer, projections joined."""
    matrices = [(rows, columns) for _, rows, columns in shape.tensors()[2:]]
    joined = (len(PROJECTIONS) * shape.heads_width, shape.width)
    return max(workspace_size(*each) for each in (*matrices, joined))


def gradient_scratch_bytes(shape: ModelShape) -> int:
    """Bytes that `Gradients` allocates (its row map apart)."""
    return 4 * (square_sums_needed(shape) + workspace_needed(shape))


def update_matrices(shape: ModelShape) -> list[UpdateMatrix]:
    """All matrices in canonical order for `optimizer_step`: second moments per row for the embedding and the final layer, as in rule.py."""
    matrices, start, at = [], 0, 0
    for name, rows, columns in shape.tensors():
        if name in ROW_NORMALISED:
            matrices.append(UpdateMatrix(start, rows, columns, per_row=True))
        else:
            count = square_sum_count(rows, columns)
            matrices.append(UpdateMatrix(start, rows, columns, sums=(at, count)))
            at += count
        start += rows * columns
    return matrices
