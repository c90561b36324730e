"""Codes: how a value is stored in 8 bits (or bf16), for normalised vectors, weights and gradients.

A code is a number of a code dtype: int8, float8_e4m3fn or bfloat16. Vectors of unit RMS are stored times `vector_scale` (int8 clips at 5.3
standard deviations), products of gate and attention result times `product_scale`, weights in units of (RMS of the matrix /
`weight_scale`), gradients in units of (largest of the row / `gradient_peak`). Rounding is to nearest even and saturates; int8 gradients
are rounded with dither instead (`dither.py`).

Products of int8 codes are sums of integers: every backend, tile shape and order gives the same int32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.dispatch import has_triton

CODE_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.bfloat16)
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_SMALLEST = {torch.int8: -128.0, torch.float8_e4m3fn: -448.0}


def vector_scale(dtype: torch.dtype) -> float:
    """Code of the value 1.0 of a unit-RMS vector."""
    return 1.0 if dtype == torch.bfloat16 else 24.0


FEW_TOKENS = 8.0
"""Attention over more tokens than these mixes values to results well below 1; over fewer, results are as large as a value."""


def product_scale(dtype: torch.dtype, width: int, slope: float) -> float:
    """Code of the value 1.0 of a product of gate and attention result, the combiner's input; `width`, `slope`: of the layer's attention.

    Where attention sees few tokens in effect (width 1, steep slopes) the products of int8 get half the scale and clip at 10.6: clipped at
    5.3 they would be off by 10 to 20 %, so by 5 to 9 %. Elsewhere clipping is rare, and rounding counts.
    """
    seen = min(float(width), 1.0 / (1.0 - 2.0**-slope)) if slope > 0 else float(width)
    return vector_scale(dtype) * (0.5 if dtype == torch.int8 and seen <= FEW_TOKENS else 1.0)


def weight_scale(dtype: torch.dtype) -> float:
    """Code of a weight that equals the RMS of its matrix."""
    return 1.0 if dtype == torch.bfloat16 else 32.0


def gradient_peak(dtype: torch.dtype) -> float:
    """Code of the largest gradient of a row or column; bf16 gradients are stored as they are (unit 1)."""
    return _LARGEST.get(dtype, 1.0)


def encode(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 numbers, already in code units -> codes: nearest even, saturating."""
    if dtype == torch.bfloat16:
        return scaled.to(dtype)
    limited = scaled.clamp(_SMALLEST[dtype], _LARGEST[dtype])
    return (limited.round() if dtype == torch.int8 else limited).to(dtype)


def ref_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [N, K] transposed -> fp32 [M, N]. int8: the exact int32 sum, rounded once to fp32; else products in fp32 (fp64 for
    inputs of fp64, as tests use)."""
    if a.dtype == torch.int8:
        return (a.double() @ b.double().T).to(torch.int32).float()  # |sum| < 2**53: exact
    if a.dtype == torch.float64:
        return a @ b.T
    return a.float() @ b.float().T


if has_triton():
    import triton
    import triton.language as tl

    ROUND_MAGIC = tl.constexpr(12582912.0)
    """1.5 * 2**23: a float below 2**22 plus this has its nearest even integer in its low bits. (Conversion instructions run at a quarter
    of the rate, and libdevice is absent in the interpreter.)"""

    @triton.jit
    def encode_tile(scaled, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
        """`encode` of an fp32 tile; DTYPE is tl.int8, tl.float8e4nv or tl.bfloat16."""
        if DTYPE == tl.int8:
            limited = tl.minimum(tl.maximum(scaled, -128.0), 127.0)
            return (limited + ROUND_MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
        elif DTYPE == tl.float8e4nv:
            return tl.minimum(tl.maximum(scaled, -448.0), 448.0).to(tl.float8e4nv)
        else:
            return scaled.to(DTYPE)

    @triton.jit
    def small_to_float(x):  # type: ignore[no-untyped-def]
        """Codes -> fp32. int8 is put into the low bits of 1.5 * 2**23 and that is subtracted: the conversion instruction is far slower."""
        if x.dtype == tl.int8:
            return (x.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
        else:
            return x.to(tl.float32)
