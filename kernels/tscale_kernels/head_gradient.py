"""The last step of every gradient of a projected segment (query, key, gate, value), shared by attention's and the combiner's backward.

Enters: d loss / d (the vector that attention or the combiner used), fp32, one head of 128 channels at a time. Leaves: d loss / d
(output of the joined projection) in its segment of d_projected, and its part of the two maxima that the quantiser needs.

    g = inverse rotation of (d - u * mean(u * d)) / rms      u = code / vector_scale: the unit vector that was used, as rotated as d is
A rotation keeps lengths and products, so the derivative of normalise may come before the inverse rotation and take u from the
rotated codes. Keys are used with their true length: no derivative of normalise. Gates and values are not rotated. A head of
rms 0 gets no gradient.

    row_max[t] = max |g| * unit of the segment          column_max[n] = max |g| * token_weight[t]
of g as it is stored (rounded to d_projected's dtype). Maxima are taken of bit patterns: any order gives the same result, and a
NaN is larger than every number, so it is not lost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tscale_kernels import codes

HEAD_CHANNELS = 128
QUERY, KEY, GATE, VALUE = range(4)
"""Segments of the joined projection, in the order of weights, units, rms rows (H each) and d_projected's columns (A each)."""


class SegmentStore(NamedTuple):
    """Where the gradients of a micro-batch go, and what their statistics need."""

    units: Tensor
    """fp32 [4]: code unit of each segment's weights."""
    token_weight: Tensor
    """fp32 [M], > 0."""
    d_projected: Tensor
    """bf16 [M, 4A], in kernel order."""
    row_max: Tensor
    """fp32 [M], changed to the larger of itself and the new maxima, as is column_max."""
    column_max: Tensor
    """fp32 [4A]"""


# -- reference ---------------------------------------------------------------------------------------------------------


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """What a reference computes in: fp64 if any tensor is fp64 (tests), else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def heads_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [M, A] -> unit vectors [M, H, 128]."""
    return x.unflatten(1, (-1, HEAD_CHANNELS)).to(dtype) / codes.vector_scale(x.dtype)


def segment_rms(rms: Tensor, segment: int) -> Tensor:
    """rms [4H, M] -> [M, H] of one segment."""
    heads = rms.shape[0] // 4
    return rms[segment * heads : (segment + 1) * heads].T


def ref_through_normalise(gradient: Tensor, unit: Tensor, rms: Tensor) -> Tensor:
    """gradient and unit vectors [M, H, 128], rms [M, H] -> gradient before normalise."""
    root = rms[:, :, None].to(gradient.dtype)
    inward = gradient - unit * (unit * gradient).mean(2, keepdim=True)
    return torch.where(root > 0, inward / root, 0.0)


def ref_rotate_back(gradient: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """[M, H, 128] with pairs in neighbouring channels, tables [T, 64] -> the same turned back by each row's angle (row % T)."""
    position = torch.arange(gradient.shape[0], device=gradient.device) % cosine.shape[0]
    turn_cosine, turn_sine = (table[position][:, None, :].to(gradient.dtype) for table in (cosine, sine))
    first, second = gradient.unflatten(2, (-1, 2)).unbind(3)
    return torch.stack((first * turn_cosine + second * turn_sine, second * turn_cosine - first * turn_sine), dim=3).flatten(2)


def ref_store(segment: int, gradient: Tensor, store: SegmentStore) -> None:
    """Write g [M, H, 128] to its segment and raise the maxima."""
    channels = gradient.shape[1] * HEAD_CHANNELS
    columns = slice(segment * channels, (segment + 1) * channels)
    stored = store.d_projected[:, columns]
    stored.copy_(gradient.flatten(1))
    size = stored.to(store.row_max.dtype).abs()
    store.row_max.copy_(torch.maximum(store.row_max, (size * store.units[segment]).amax(1)))
    column_max = store.column_max[columns]
    column_max.copy_(torch.maximum(column_max, (size * store.token_weight[:, None]).amax(0)))
