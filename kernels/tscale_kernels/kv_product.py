"""Backward of the combiner's products: enters the gradient of products, leaves the gradients of gate and of the attention result.

products[h, i, j, m] = gate[h, i, m] * out[h, j, m] (i, j = 0..3, m = 0..31; blocked order, tscale_fed/model/combiner.py), so
    d_out[h, j, m] = sum_i d_products[h, i, j, m] * gate[h, i, m]          rounded to bf16
    d_gate[h, i, m] = sum_j d_products[h, i, j, m] * out[h, j, m]          then through normalise into d_projected's gate segment
    delta[h] = sum over channels of out * d_out (rounded)                  attention's backward needs it
A pass that reads and writes everything once; the four-fold tensor is the largest of the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.attention import PRODUCTS_PER_CHANNEL
from tscale_kernels.dispatch import BackendName
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

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_products_backward(
    d_products: Tensor, gate: Tensor, out: Tensor, rms: Tensor, *, d_out: Tensor, delta: Tensor | None, store: SegmentStore
) -> None:
    """See `products_backward`."""
    dtype = working_dtype(d_products, rms)
    unit = heads_of(gate, dtype)
    gates = unit.unflatten(2, (PRODUCTS_PER_CHANNEL, -1))
    outs = out.to(dtype).unflatten(1, (-1, PRODUCTS_PER_CHANNEL, HEAD_CHANNELS // PRODUCTS_PER_CHANNEL))
    d_pairs = d_products.to(dtype).unflatten(1, (-1, PRODUCTS_PER_CHANNEL, PRODUCTS_PER_CHANNEL, HEAD_CHANNELS // PRODUCTS_PER_CHANNEL))
    d_out.copy_(torch.einsum("thijm,thim->thjm", d_pairs, gates).flatten(1))
    if delta is not None:
        delta.copy_((outs.flatten(2) * d_out.to(dtype).view_as(unit)).sum(2).T)
    d_gate = torch.einsum("thijm,thjm->thim", d_pairs, outs).flatten(2)
    ref_store(GATE, ref_through_normalise(d_gate, unit, segment_rms(rms, GATE)), store)


# -- run ---------------------------------------------------------------------------------------------------------------


def products_backward(
    d_products: Tensor,
    gate: Tensor,
    out: Tensor,
    rms: Tensor,
    *,
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

    d_products: bf16 [M, 4A]. gate: [M, A] codes. out: bf16 [M, A] as `attend` stored it. rms: fp32 [4H, M] (gate rows 2H..3H-1 are read).
    units: fp32 [4]. token_weight: fp32 [M], > 0.
    Writes d_out bf16 [M, A], delta fp32 [H, M] (None: not wanted, as for width 1), the gate segment of d_projected bf16 [M, 4A]; raises
    row_max fp32 [M] and column_max fp32 [4A] (the caller zeroes them before the first op that writes into d_projected).
    """
    store = SegmentStore(units, token_weight, d_projected, row_max, column_max)
    ref_products_backward(d_products, gate, out, rms, d_out=d_out, delta=delta, store=store)
