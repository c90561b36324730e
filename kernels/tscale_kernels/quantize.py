"""Gradients to codes: one reading of g [M, N] (token, channel) writes the codes of both products that need it.

    codes[t, n]   = code(g[t, n] * segment_unit(n) / row_unit[t])      row_unit[t]    = row_max[t] / peak
    codes_t[n, t] = code(g[t, n] * weight[t] / column_unit[n])         column_unit[n] = column_max[n] / peak
row_max[t] = max_n |g[t, n]| segment_unit(n) and column_max[n] = max_t |g[t, n]| weight[t] come from the kernel that made g, or from
`row_max` and `column_max` here. For the data gradient the row's unit factors out of the sum; for the weight gradient the column's does,
and the token weights cancel against those of the inputs (`balance.py`, `transpose.py`). Segments are the joined matrices of a projection.

Codes of int8 are dithered in fixed point: v is rounded to 1/256, a byte of noise is added, the fraction is cut off, so the mean of a code
is v to 1/512. One 32-bit hash gives the four bytes that two neighbouring channels need (`dither.py`, counting pairs): hashes of their own
for both codes of a number would take longer than the memory traffic (63 M numbers: 85 us of integer instructions on an H100, 84 us of
bytes). e4m3 is rounded to nearest even; bf16 codes have unit 1. A row or column below 1e-30 gets codes 0; a maximum that is NaN or infinite
makes its unit so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.codes import encode, gradient_peak
from tscale_kernels.dispatch import BackendName, choose
from tscale_kernels.dither import mixed_seed, ref_hash

_FRACTION = 256.0
_MAGIC = 12582912.0
_SMALLEST_MAXIMUM = 1e-30
_INT8_PEAK = 126.5
"""Half a code below the largest, so that maxima found before g was rounded to bf16 (too small by 2**-9 at most) cannot overflow a code."""


def quantizer_peak(dtype: torch.dtype) -> float:
    """Code units of the largest gradient of a row or column; bf16 has none (its unit is 1)."""
    return _INT8_PEAK if dtype == torch.int8 else gradient_peak(dtype)


# -- reference ---------------------------------------------------------------------------------------------------------


def ref_rows_and_transpose(
    g: Tensor,
    *,
    row_max: Tensor,
    column_max: Tensor,
    token_weight: Tensor,
    segment_units: Tensor | None,
    seed: Tensor,
    salt: int,
    codes: Tensor,
    row_unit: Tensor,
    codes_t: Tensor,
    column_unit: Tensor,
) -> None:
    """See `rows_and_transpose`."""
    rows, columns = g.shape
    row_noise, column_noise = ref_noise_bytes(rows, columns, seed, salt)
    row_factor = _factor(row_max, codes.dtype)[:, None]
    if segment_units is not None:
        row_factor = row_factor * segment_units.repeat_interleave(columns // segment_units.numel())
    codes.copy_(_code(g.float() * row_factor, row_noise, codes.dtype))
    weighted = g.float() * token_weight[:, None] * _factor(column_max, codes.dtype)
    codes_t.copy_(_code(weighted, column_noise, codes.dtype).T)
    row_unit.copy_(_unit(row_max, codes.dtype))
    column_unit.copy_(_unit(column_max, codes.dtype))


def ref_noise_bytes(rows: int, columns: int, seed: Tensor, salt: int) -> tuple[Tensor, Tensor]:
    """Noise 0..255 (fp32 [rows, columns]) of row codes and of column codes. Bytes 0 and 1 of the hash of a pair are the row noise of its
    even and odd channel, bytes 2 and 3 the column noise."""
    pair = torch.arange(rows * columns // 2, dtype=torch.int64, device=seed.device).view(rows, columns // 2)
    hashed = ref_hash(pair ^ mixed_seed(seed, salt))
    row, column = (torch.stack((hashed >> shift & 255, hashed >> shift + 8 & 255), -1).flatten(1).float() for shift in (0, 16))
    return row, column


def _factor(maximum: Tensor, dtype: torch.dtype) -> Tensor:
    """What a gradient is multiplied by to become a code (int8: in 1/256 of a code)."""
    if dtype == torch.bfloat16:
        return torch.ones_like(maximum)
    peak = quantizer_peak(dtype) * (_FRACTION if dtype == torch.int8 else 1.0)
    return torch.where(maximum > _SMALLEST_MAXIMUM, peak / maximum, 0.0)


def _unit(maximum: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ones_like(maximum) if dtype == torch.bfloat16 else maximum / quantizer_peak(dtype)


def _code(scaled: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.int8:
        return encode(scaled, dtype)
    fixed = (scaled + (noise + _MAGIC)) - _MAGIC  # rounded to a whole number of 1/256 by the fp32 addition
    return torch.floor(fixed / _FRACTION).to(torch.int8)


def ref_column_max(g: Tensor, *, token_weight: Tensor, out: Tensor) -> None:
    """See `column_max`."""
    out.copy_(torch.maximum(out, (g.float().abs() * token_weight[:, None]).amax(0)))


def ref_row_max(g: Tensor, *, segment_units: Tensor | None, out: Tensor) -> None:
    """See `row_max`."""
    size = g.float().abs()
    if segment_units is not None:
        size = size * segment_units.repeat_interleave(g.shape[1] // segment_units.numel())
    out.copy_(size.amax(1))


# -- run ---------------------------------------------------------------------------------------------------------------


def rows_and_transpose(
    g: Tensor,
    *,
    row_max: Tensor,
    column_max: Tensor,
    token_weight: Tensor,
    segment_units: Tensor | None,
    seed: Tensor,
    salt: int,
    codes: Tensor,
    row_unit: Tensor,
    codes_t: Tensor,
    column_unit: Tensor,
    backend: BackendName | None = None,
) -> None:
    """Codes of g by rows and, transposed, by columns.

    g: bf16 or fp32 [M, N]. row_max, token_weight: fp32 [M]. column_max: fp32 [N]. segment_units: fp32 [S] of S equal parts of the columns,
    or None for units of 1. seed: int32 [1]; salt: 0 <= salt < 2**32, its own for every matrix of a step.
    Writes codes [M, N] and codes_t [N, M] (int8, e4m3 or bf16), row_unit fp32 [M], column_unit fp32 [N].
    M and N / S are multiples of 128, M * N < 2**32. The maxima are those of g (up to a rounding of g to bf16).
    """
    choose(g.device, backend)
    ref_rows_and_transpose(
        g, row_max=row_max, column_max=column_max, token_weight=token_weight, segment_units=segment_units, seed=seed, salt=salt,
        codes=codes, row_unit=row_unit, codes_t=codes_t, column_unit=column_unit,
    )  # fmt: skip


def column_max(g: Tensor, *, token_weight: Tensor, out: Tensor, backend: BackendName | None = None) -> None:
    """out[n] = max(out[n], max_t |g[t, n]| * token_weight[t]): the caller zeroes out. g: bf16 or fp32 [M, N]; fp32 [M]; fp32 [N]."""
    choose(g.device, backend)
    ref_column_max(g, token_weight=token_weight, out=out)


def row_max(g: Tensor, *, segment_units: Tensor | None, out: Tensor, backend: BackendName | None = None) -> None:
    """out[t] = max_n |g[t, n]| * segment_unit(n). g: bf16 or fp32 [M, N]; segment_units: fp32 [S] or None; out: fp32 [M], overwritten."""
    choose(g.device, backend)
    ref_row_max(g, segment_units=segment_units, out=out)
