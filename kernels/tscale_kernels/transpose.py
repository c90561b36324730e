"""Inputs of a weight gradient: the forward operand, scaled token by token, requantised by column and stored transposed.

    codes_t[k, t] = nearest(x[t, k] * token_scale[t] / column_unit[k]),    column_unit[k] = max_t |x[t, k]| token_scale[t] / peak
token_scale is the inverse of the weights that the gradient side was multiplied with (`balance.py`), so the two cancel in the product.
x is a normalised operand (`transpose_scaled`, optionally with the ReLU of it) or the products of gate and attention result
(`transpose_products`, made again here, not rounded in between). bf16 codes have unit 1.

Rows of the transposed products are in the canonical order of the combiner's columns: row h*512 + r*128 + z holds
gate[h, z XOR r] * out[h, z], in natural channels z. (Gate and result come in blocked order, see tscale_fed/model/combiner.py; a transpose
can put rows where it likes.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.codes import encode, vector_scale
from tscale_kernels.dispatch import BackendName, choose

_PEAK = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_SMALLEST_MAXIMUM = 1e-30
_REPLICAS, _BLOCK = 4, 32

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_transpose_scaled(x: Tensor, *, token_scale: Tensor, relu: bool, codes_t: Tensor, column_max: Tensor, column_unit: Tensor) -> None:
    """See `transpose_scaled`."""
    numbers = x.float().clamp(min=0.0) if relu else x.float()
    _ref_transpose(numbers * token_scale[:, None], vector_scale(x.dtype), codes_t, column_max, column_unit)


def ref_transpose_products(
    gate: Tensor, out: Tensor, *, token_scale: Tensor, codes_t: Tensor, column_max: Tensor, column_unit: Tensor
) -> None:
    """See `transpose_products`."""
    rows = gate.shape[0]
    gate_blocks = gate.float().view(rows, -1, _REPLICAS, 1, _BLOCK)
    out_blocks = (out.float() * token_scale[:, None]).view(rows, -1, 1, _REPLICAS, _BLOCK)
    products = (gate_blocks * out_blocks).flatten(1)  # [M, (h, i, j, m)]
    canonical = products.index_select(1, _kernel_columns(codes_t.shape[0], gate.device))
    _ref_transpose(canonical, vector_scale(gate.dtype), codes_t, column_max, column_unit)


def _kernel_columns(columns: int, device: torch.device) -> Tensor:
    """Place h*512 + i*128 + j*32 + m of the product that canonical column h*512 + r*128 + (4m + j), r = i XOR j, reads."""
    column = torch.arange(columns, device=device)
    head, replica, channel = column // 512, column // 128 % 4, column % 128
    m, j = channel // 4, channel % 4
    return head * 512 + (replica ^ j) * 128 + j * 32 + m


def _ref_transpose(scaled: Tensor, scale: float, codes_t: Tensor, column_max: Tensor, column_unit: Tensor) -> None:
    """scaled [M, K]: numbers that are `scale` times the true ones."""
    if codes_t.dtype == torch.bfloat16:
        column_unit.fill_(1.0 / scale)
        codes_t.copy_(scaled.T.to(torch.bfloat16))
        return
    peak = _PEAK[codes_t.dtype]
    column_max.copy_(scaled.abs().amax(0))
    factor = torch.where(column_max > _SMALLEST_MAXIMUM, torch.full_like(column_max, peak) / column_max, 0.0)
    column_unit.copy_(column_max / torch.full_like(column_max, peak * scale))
    codes_t.copy_(encode(scaled * factor, codes_t.dtype).T)


# -- run ---------------------------------------------------------------------------------------------------------------


def transpose_scaled(
    x: Tensor,
    *,
    token_scale: Tensor,
    relu: bool,
    codes_t: Tensor,
    column_max: Tensor,
    column_unit: Tensor,
    backend: BackendName | None = None,
) -> None:
    """Codes of x * token_scale by columns, transposed.

    x: codes [M, K] whose values are code / vector_scale; relu: take max(x, 0). token_scale: fp32 [M], > 0.
    Writes codes_t [K, M] of x's dtype and column_unit fp32 [K] (which includes 1 / vector_scale); column_max fp32 [K] is scratch.
    M and K are multiples of 128.
    """
    choose(x.device, backend)
    ref_transpose_scaled(x, token_scale=token_scale, relu=relu, codes_t=codes_t, column_max=column_max, column_unit=column_unit)


def transpose_products(
    gate: Tensor,
    out: Tensor,
    *,
    token_scale: Tensor,
    codes_t: Tensor,
    column_max: Tensor,
    column_unit: Tensor,
    backend: BackendName | None = None,
) -> None:
    """Codes of (gate * out) * token_scale by columns, transposed, rows in the canonical order of combiner columns.

    gate: codes [M, A] in blocked channel order; out: bf16 [M, A], the attention result in blocked order. token_scale: fp32 [M], > 0.
    Writes codes_t [4A, M] of gate's dtype and column_unit fp32 [4A]; column_max fp32 [4A] is scratch. M and A are multiples of 128.
    """
    choose(gate.device, backend)
    ref_transpose_products(gate, out, token_scale=token_scale, codes_t=codes_t, column_max=column_max, column_unit=column_unit)
