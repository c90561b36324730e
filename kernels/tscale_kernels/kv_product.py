"""Backward of the combiner's products: enters the gradient of products, leaves the gradients of gate and of the attention result.

products[h, i, j, m] = gate[h, i, m] * out[h, j, m] (i, j = 0..3, m = 0..31; blocked order, tscale_fed/model/combiner.py), so
    d_out[h, j, m] = sum_i d_products[h, i, j, m] * gate[h, i, m]          rounded to bf16
    d_gate[h, i, m] = sum_j d_products[h, i, j, m] * out[h, j, m]          then through normalise into d_projected's gate segment
    delta[h] = sum over channels of out * d_out (rounded)                  attention's backward needs it
A pass that reads and writes everything once; the four-fold tensor is the largest of the backward pass, and may come as int8 codes with a
unit for each row and (h, i).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels import codes
from tscale_kernels.attention import PRODUCTS_PER_CHANNEL
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.head_gradient import (
    GATE,
    HEAD_CHANNELS,
    SegmentStore,
    heads_of,
    ref_store,
    ref_through_normalise,
    segment_rms,
    working_dtype,
)
from tscale_kernels.launch_table import launch

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_products_backward(
    d_products: Tensor, gate: Tensor, out: Tensor, rms: Tensor,
    *, d_unit: Tensor | None = None, d_out: Tensor, delta: Tensor | None, store: SegmentStore,
) -> None:  # fmt: skip
    """See `products_backward`."""
    dtype = working_dtype(d_products, rms)
    unit = heads_of(gate, dtype)
    gates = unit.unflatten(2, (PRODUCTS_PER_CHANNEL, -1))
    outs = out.to(dtype).unflatten(1, (-1, PRODUCTS_PER_CHANNEL, HEAD_CHANNELS // PRODUCTS_PER_CHANNEL))
    d_pairs = d_products.to(dtype).unflatten(1, (-1, PRODUCTS_PER_CHANNEL, PRODUCTS_PER_CHANNEL, HEAD_CHANNELS // PRODUCTS_PER_CHANNEL))
    if d_unit is not None:
        d_pairs = d_pairs * d_unit.T.to(dtype).unflatten(1, (-1, PRODUCTS_PER_CHANNEL))[:, :, :, None, None]
    d_out.copy_(torch.einsum("thijm,thim->thjm", d_pairs, gates).flatten(1))
    if delta is not None:
        delta.copy_((outs.flatten(2) * d_out.to(dtype).view_as(unit)).sum(2).T)
    d_gate = torch.einsum("thijm,thjm->thim", d_pairs, outs).flatten(2)
    ref_store(GATE, ref_through_normalise(d_gate, unit, segment_rms(rms, GATE)), store)


# -- Triton ------------------------------------------------------------------------------------------------------------
# One program handles BR rows of one head as 4 x 4 tiles of 32 channels: all sums over i and j are within a thread. BR divides 128.

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.codes import small_to_float
    from tscale_kernels.head_gradient import size_bits
    from tscale_kernels.tiles import capability

    @triton.jit
    def through_gate(p_products, p_gate, p_unit, gate_scale, out0, out1, out2, out3, sum0, sum1, sum2, sum3):  # type: ignore[no-untyped-def]
        """The tiles of one i: (unit gate, d_gate, the four sums of d_out with the tiles added), all [BR, 32]. p_unit [BR]: to the units of
        d_products' codes, or None."""
        unit = small_to_float(tl.load(p_gate)) * gate_scale
        pair0 = small_to_float(tl.load(p_products))
        pair1 = small_to_float(tl.load(p_products + 32))
        pair2 = small_to_float(tl.load(p_products + 64))
        pair3 = small_to_float(tl.load(p_products + 96))
        d_gate = pair0 * out0 + pair1 * out1 + pair2 * out2 + pair3 * out3
        factor = unit
        if p_unit is not None:
            pair_unit = tl.load(p_unit)[:, None]
            d_gate = d_gate * pair_unit
            factor = unit * pair_unit
        return unit, d_gate, sum0 + pair0 * factor, sum1 + pair1 * factor, sum2 + pair2 * factor, sum3 + pair3 * factor

    @triton.jit
    def store_d_out(p_d_out, total, out_tile):  # type: ignore[no-untyped-def]
        """Stores one tile of d_out; its part of delta [BR]."""
        stored = total.to(tl.bfloat16)
        tl.store(p_d_out, stored)
        return tl.sum(out_tile * stored.to(tl.float32), axis=1)

    @triton.jit
    def store_d_gate(p_d_gate, d_gate, unit, along, inverse_root, weight, column_max):  # type: ignore[no-untyped-def]
        """Normalise's derivative of one tile, stored; its column maxima are raised; the bits of its largest elements [BR]."""
        stored = ((d_gate - unit * along[:, None]) * inverse_root[:, None]).to(tl.bfloat16)
        tl.store(p_d_gate, stored)
        rounded = stored.to(tl.float32)
        tl.atomic_max(column_max, tl.max(size_bits(rounded * weight[:, None]), axis=0), sem="relaxed")
        return tl.max(size_bits(rounded), axis=1)

    @triton.jit
    def products_backward_kernel(  # type: ignore[no-untyped-def]
        d_products, d_unit, gate, out, rms, units, token_weight, d_out, delta, d_projected, row_max, column_max, rows, heads, gate_scale,
        BR: tl.constexpr, DELTA: tl.constexpr,
    ):  # fmt: skip
        """See `products_backward`. row_max and column_max are int32 views."""
        head = tl.program_id(0) % heads
        o_row = tl.program_id(0) // heads * BR + tl.arange(0, BR)
        o_channel = tl.arange(0, 32)
        o_tile = o_row[:, None].to(tl.int64) * (heads * 128) + head * 128 + o_channel[None, :]
        p_products = d_products + o_row[:, None].to(tl.int64) * (heads * 512) + head * 512 + o_channel[None, :]
        out0, out1 = tl.load(out + o_tile).to(tl.float32), tl.load(out + o_tile + 32).to(tl.float32)
        out2, out3 = tl.load(out + o_tile + 64).to(tl.float32), tl.load(out + o_tile + 96).to(tl.float32)
        zero = tl.zeros((BR, 32), tl.float32)
        p_unit0, p_unit1, p_unit2, p_unit3 = None, None, None, None
        if d_unit is not None:
            p_unit0 = d_unit + (head * 4).to(tl.int64) * rows + o_row
            p_unit1, p_unit2, p_unit3 = p_unit0 + rows, p_unit0 + 2 * rows, p_unit0 + 3 * rows
        unit0, d_gate0, sum0, sum1, sum2, sum3 = through_gate(
            p_products, gate + o_tile, p_unit0, gate_scale, out0, out1, out2, out3, zero, zero, zero, zero
        )
        unit1, d_gate1, sum0, sum1, sum2, sum3 = through_gate(
            p_products + 128, gate + o_tile + 32, p_unit1, gate_scale, out0, out1, out2, out3, sum0, sum1, sum2, sum3
        )
        unit2, d_gate2, sum0, sum1, sum2, sum3 = through_gate(
            p_products + 256, gate + o_tile + 64, p_unit2, gate_scale, out0, out1, out2, out3, sum0, sum1, sum2, sum3
        )
        unit3, d_gate3, sum0, sum1, sum2, sum3 = through_gate(
            p_products + 384, gate + o_tile + 96, p_unit3, gate_scale, out0, out1, out2, out3, sum0, sum1, sum2, sum3
        )
        total = store_d_out(d_out + o_tile, sum0, out0) + store_d_out(d_out + o_tile + 32, sum1, out1)
        total += store_d_out(d_out + o_tile + 64, sum2, out2) + store_d_out(d_out + o_tile + 96, sum3, out3)
        if DELTA:
            tl.store(delta + head.to(tl.int64) * rows + o_row, total)
        along = tl.sum(unit0 * d_gate0 + unit1 * d_gate1 + unit2 * d_gate2 + unit3 * d_gate3, axis=1) * 0.0078125
        root = tl.load(rms + (2 * heads + head).to(tl.int64) * rows + o_row)
        inverse_root = tl.where(root > 0, 1.0 / root, 0.0)
        weight = tl.load(token_weight + o_row)
        p_d_gate = d_projected + o_row[:, None].to(tl.int64) * (heads * 512) + (2 * heads + head) * 128 + o_channel[None, :]
        p_column = column_max + (2 * heads + head) * 128 + o_channel
        size = tl.maximum(
            store_d_gate(p_d_gate, d_gate0, unit0, along, inverse_root, weight, p_column),
            store_d_gate(p_d_gate + 32, d_gate1, unit1, along, inverse_root, weight, p_column + 32),
        )
        size = tl.maximum(size, store_d_gate(p_d_gate + 64, d_gate2, unit2, along, inverse_root, weight, p_column + 64))
        size = tl.maximum(size, store_d_gate(p_d_gate + 96, d_gate3, unit3, along, inverse_root, weight, p_column + 96))
        row_size = size.to(tl.float32, bitcast=True) * tl.load(units + 2)
        tl.atomic_max(row_max + o_row, row_size.to(tl.int32, bitcast=True), sem="relaxed")


def _launch_products_backward(
    d_products: Tensor, gate: Tensor, out: Tensor, rms: Tensor,
    *, d_unit: Tensor | None, d_out: Tensor, delta: Tensor | None, store: SegmentStore,
) -> None:  # fmt: skip
    rows, heads = gate.shape[0], gate.shape[1] // HEAD_CHANNELS
    config = launch("products_backward", capability(gate.device))
    products_backward_kernel[(rows // config["BR"] * heads,)](
        d_products, d_unit, gate, out, rms, store.units, store.token_weight, d_out, rms if delta is None else delta, store.d_projected,
        store.row_max.view(torch.int32), store.column_max.view(torch.int32), rows, heads, 1.0 / codes.vector_scale(gate.dtype),
        DELTA=delta is not None, **config,
    )  # fmt: skip


# -- run ---------------------------------------------------------------------------------------------------------------


def products_backward(
    d_products: Tensor,
    gate: Tensor,
    out: Tensor,
    rms: Tensor,
    *,
    d_unit: Tensor | None = None,
    units: Tensor,
    token_weight: Tensor,
    d_out: Tensor,
    delta: Tensor | None,
    d_projected: Tensor,
    row_max: Tensor,
    column_max: Tensor,
    backend: BackendName | None = None,
) -> None:
    """Gradients of gate and attention result.

    d_products: bf16 [M, 4A]; or int8 with d_unit fp32 [4H, M], row 4h + i, value = code * unit (`matmul_dgrad.to_input`). gate: [M, A]
    codes. out: bf16 [M, A] as `attend` stored it. rms: fp32 [4H, M] (gate rows 2H..3H-1 are read). units: fp32 [4]. token_weight: fp32
    [M], > 0.
    Writes d_out bf16 [M, A], delta fp32 [H, M] (None: not wanted, as for width 1), the gate segment of d_projected bf16 [M, 4A]; raises
    row_max fp32 [M] and column_max fp32 [4A] (the caller zeroes them before the first op that writes into d_projected).
    """
    store = SegmentStore(units, token_weight, d_projected, row_max, column_max)
    backward = _launch_products_backward if choose(gate.device, backend).name == "triton" else ref_products_backward
    backward(d_products, gate, out, rms, d_unit=d_unit, d_out=d_out, delta=delta, store=store)
