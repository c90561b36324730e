"""Stored precisions of the original, emulated: enters fp32 values, leaves the fp32 values that its arithmetic would see.

Weights (TScale): a matrix is kept as int8 with one scale, its RMS: W8 = clamp(round(32 W / rms), -128, 127), used as W8 * rms / 32; the
embedding is kept as half precision of the same quotient. Rounding is to nearest even; the gradient passes straight through to the full
weights. Gradients (TScale): leave the device as int8 with one fp32 scale (largest / 127) per row and 128 columns, nearest.
"""

from collections.abc import Callable
from typing import Any

import torch

WeightRounding = Callable[[str, torch.Tensor], torch.Tensor]
"""(matrix name, weights [rows, columns]) -> weights of the same shape as the forward pass shall see them."""

WEIGHT_STEPS_PER_RMS = 32
GRADIENT_BLOCK_COLUMNS = 128
_INT8_LOW, _INT8_HIGH = -128, 127


class _StraightThrough(torch.autograd.Function):
    """The rounded weights, bit for bit, with the identity as gradient."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def _per_rms(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights in units of rms / 32, rms / 32); a matrix of zeros gives zeros."""
    unit = weight.square().mean().sqrt() / WEIGHT_STEPS_PER_RMS
    return torch.where(unit > 0, weight / unit, 0.0), unit


def round_weights(name: str, weight: torch.Tensor) -> torch.Tensor:
    """`WeightRounding` of the original: half precision for the embedding, int8 for every other matrix."""
    with torch.no_grad():
        quotient, unit = _per_rms(weight)
        if name == "embedding":
            rounded = quotient.half().to(weight.dtype) * unit
        else:
            rounded = quotient.round().clamp(_INT8_LOW, _INT8_HIGH) * unit
    return _StraightThrough.apply(weight, rounded)


def pack_gradient(gradient: torch.Tensor) -> torch.Tensor:
    """Gradient [rows, columns] after int8 packing per 128 columns; columns must be a multiple of 128."""
    blocks = gradient.unflatten(-1, (-1, GRADIENT_BLOCK_COLUMNS))
    step = blocks.abs().amax(-1, keepdim=True) / _INT8_HIGH
    return torch.where(step > 0, (blocks / step).round() * step, 0.0).flatten(-2)
