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
from tscale_kernels.dispatch import has_triton

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


# -- Triton ------------------------------------------------------------------------------------------------------------
# Tiles hold rows of one head: o_row [R] are their rows of the matrix, m_row [R] says which of them are wanted.

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def through_normalise(gradient, unit, head_rms, o_row, m_row):  # type: ignore[no-untyped-def]
        """`ref_through_normalise` of a tile [R, 128]; head_rms points to the head's row of rms."""
        root = tl.load(head_rms + o_row, mask=m_row, other=0.0)
        inward = gradient - unit * (tl.sum(unit * gradient, axis=1) * 0.0078125)[:, None]
        return inward * tl.where(root > 0, 1.0 / root, 0.0)[:, None]

    @triton.jit
    def rotate_back(gradient, cosine, sine, position, m_row, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        """`ref_rotate_back` of a tile [R, 128]; position [R] in the fragment."""
        p_angle = position[:, None] * 64 + tl.arange(0, 64)[None, :]
        turn_cosine = tl.load(cosine + p_angle, mask=m_row[:, None], other=1.0)
        turn_sine = tl.load(sine + p_angle, mask=m_row[:, None], other=0.0)
        first, second = tl.split(tl.reshape(gradient, (ROWS, 64, 2)))
        turned = tl.join(first * turn_cosine + second * turn_sine, second * turn_cosine - first * turn_sine)
        return tl.reshape(turned, (ROWS, 128))

    @triton.jit
    def size_bits(x):  # type: ignore[no-untyped-def]
        """|x| of fp32 as int32 bits, which compare as the sizes do; a NaN is larger than all."""
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF

    @triton.jit
    def store_gradient(  # type: ignore[no-untyped-def]
        gradient, d_projected, row_max, column_max, units, token_weight, first_row, o_row, m_row, segment, head, heads, TMA: tl.constexpr,
    ):  # fmt: skip
        """`ref_store` of a tile [R, 128], rows first_row and following. d_projected: a descriptor of such tiles if TMA (all rows are wanted
        then), else a pointer. row_max and column_max are int32 views."""
        stored = gradient.to(tl.bfloat16)
        first_column = (segment * heads + head) * 128
        column = first_column + tl.arange(0, 128)
        if TMA:
            d_projected.store([first_row, first_column], stored)
        else:
            tl.store(d_projected + o_row[:, None].to(tl.int64) * (heads * 512) + column[None, :], stored, mask=m_row[:, None])
        rounded = stored.to(tl.float32)
        size = tl.max(size_bits(rounded), axis=1).to(tl.float32, bitcast=True) * tl.load(units + segment)
        tl.atomic_max(row_max + o_row, size.to(tl.int32, bitcast=True), mask=m_row, sem="relaxed")
        weight = tl.load(token_weight + o_row, mask=m_row, other=0.0)
        tl.atomic_max(column_max + column, tl.max(size_bits(rounded * weight[:, None]), axis=0), sem="relaxed")
