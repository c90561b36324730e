"""Weights as decoding reads them: enters the flat vector of a model, leaves matrices that are multiplied as they stand.

Every factor 1 / sqrt(inputs) is in the matrix, the four projections of attention are one, and gate, value and combiner channels are in the
blocked order of `model.combiner`. Formats: float32, bfloat16; or int8 with one scale per output row (symmetric, the largest weight of a
row is 127), which are multiplied in bfloat16: one byte per weight is read instead of two or four.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tscale_fed.model.combiner import blocked_channels, blocked_columns
from tscale_fed.model.shape import ModelShape
from tscale_net.errors import Refused

Format = Literal["float32", "bfloat16", "int8"]
FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "int8")
_INT8_LARGEST = 127


@dataclass(frozen=True, slots=True)
class Matrix:
    """y = x M^T of [..., inputs] -> [..., outputs]. `scale` [outputs]: of int8 values; None: the values are floating point."""

    values: Tensor
    scale: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return torch.nn.functional.linear(x, self.values)
        if x.is_cuda:
            return torch.nn.functional.linear(x, self.values.to(x.dtype)) * self.scale
        flat = torch._weight_int8pack_mm(x.flatten(0, -2), self.values, self.scale)
        return flat.unflatten(0, x.shape[:-1])

    @property
    def bytes(self) -> int:
        """What one product reads of it."""
        return self.values.numel() * self.values.element_size()


@dataclass(frozen=True, slots=True)
class LayerMatrices:
    """`projection` [4A, E]: query, gate, value (these two in blocked order), key."""

    kind: tuple[int, float]
    projection: Matrix
    combiner: Matrix
    ffn_up: Matrix
    ffn_down: Matrix


@dataclass(frozen=True, slots=True)
class DecodingWeights:
    """A model. `compute`: of the products and what enters them; the state is float32."""

    shape: ModelShape
    compute: torch.dtype
    embedding: Tensor
    """[rows, E]: rows of tokens begin at `first_token_row`."""
    layers: tuple[LayerMatrices, ...]
    final: Matrix
    bias: Tensor
    """fp32 [V], natural units."""

    @property
    def first_token_row(self) -> int:
        return self.shape.noise_rows + 1

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def bytes_per_step(self) -> int:
        """Read in every step, whatever the number of sequences."""
        parts = [m.bytes for layer in self.layers for m in (layer.projection, layer.combiner, layer.ffn_up, layer.ffn_down)]
        return sum(parts) + self.final.bytes


def prepare_weights(shape: ModelShape, flat: Tensor, bias: Tensor, device: torch.device, kind: Format) -> DecodingWeights:
    """flat: fp [parameters], any device. bias: fp32 [V], natural units. Raises Refused("bad-model") if sizes do not fit."""
    if flat.shape != (shape.trained_parameters,) or bias.shape != (shape.vocab,):
        raise Refused(
            "bad-model", f"the weights are not those of a model {shape.dims}: {flat.numel()} of {shape.trained_parameters} values"
        )
    compute = torch.float32 if kind == "float32" else torch.bfloat16
    parts = _matrices(shape, flat)
    channels, columns = blocked_channels(shape.heads), blocked_columns(shape.heads)

    def matrix(values: Tensor) -> Matrix:
        scaled = values.float() * values.shape[1] ** -0.5
        if kind == "int8":
            return _int8(scaled, device, compute)
        return Matrix(scaled.to(device, compute).contiguous())

    layers = []
    for index, layer_kind in enumerate(shape.layers()):
        get = {name.rpartition(".")[2]: part for name, part in parts.items() if name.startswith(f"layers.{index}.")}
        joined = torch.cat((get["query"], get["gate"][channels], get["value"][channels], get["key"]))
        layers.append(
            LayerMatrices(layer_kind, matrix(joined), matrix(get["combiner"][:, columns]), matrix(get["ffn_up"]), matrix(get["ffn_down"]))
        )
    embedding = parts["embedding"].to(device, torch.float32 if kind == "float32" else torch.bfloat16)
    return DecodingWeights(shape, compute, embedding, tuple(layers), matrix(parts["final"]), bias.float().to(device))


def _matrices(shape: ModelShape, flat: Tensor) -> dict[str, Tensor]:
    found, start = {}, 0
    for name, rows, columns in shape.tensors():
        found[name] = flat[start : start + rows * columns].view(rows, columns)
        start += rows * columns
    return found


def _int8(values: Tensor, device: torch.device, compute: torch.dtype) -> Matrix:
    scale = values.abs().amax(1) / _INT8_LARGEST
    codes = torch.where(scale[:, None] > 0, values / scale[:, None], 0.0).round_().to(torch.int8)
    return Matrix(codes.to(device), scale.to(device, compute))
