"""Gradients to codes: one reading of g [M, N] (token, channel) writes the codes of both products that need it.

    codes[t, n]   = code(g[t, n] * segment_unit(n) / row_unit[t])      row_unit[t]    = row_max[t] / peak
    codes_t[n, t] = code(g[t, n] * weight[t] / column_unit[n])         column_unit[n] = column_max[n] / peak
row_max[t] = max_n |g[t, n]| segment_unit(n) and column_max[n] = max_t |g[t, n]| weight[t] come from the kernel that made g, or from
`row_max` and `column_max` here. For the data gradient the row's unit factors out of the sum; for the weight gradient the column's does,
and the token weights cancel against those of the inputs (`balance.py`, `transpose.py`). Segments are the joined matrices of a projection.

Codes of int8 are dithered in fixed point: v is rounded to 1/256, a byte of noise is added, the fraction is cut off, so the mean of a code
is v to 1/512. One 32-bit hash gives the four bytes that two neighbouring channels need (`dither.py`, counting pairs): a hash for each would
take longer than the memory traffic. e4m3 is rounded to nearest even; bf16 codes have unit 1. A row or column below 1e-30 gets codes 0; a
maximum that is NaN or infinite makes its unit so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels import tiles
from tscale_kernels.codes import encode, gradient_peak
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.dither import mixed_seed, ref_hash
from tscale_kernels.launch_table import fitted, launch

_FRACTION = 256.0
_SMALLEST_MAXIMUM = 1e-30
_INT8_PEAK = 126.5  # half a code below the largest: a maximum found before g was rounded to bf16 may be too small by 2**-9


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
    """Noise 0..255 (fp32 [rows, columns]) of row codes and of column codes. Bytes 0 and 2 of the hash of a pair are the row noise of its
    even and odd channel, bytes 1 and 3 the column noise."""
    pair = torch.arange(rows * columns // 2, dtype=torch.int64, device=seed.device).view(rows, columns // 2)
    hashed = ref_hash(pair ^ mixed_seed(seed, salt))
    row, column = (torch.stack((hashed >> shift & 255, hashed >> shift + 16 & 255), -1).flatten(1).float() for shift in (0, 8))
    return row, column


def _factor(maximum: Tensor, dtype: torch.dtype) -> Tensor:
    """What a gradient is multiplied by to become a code (int8: in 1/256 of a code)."""
    if dtype == torch.bfloat16:
        return torch.ones_like(maximum)
    peak = quantizer_peak(dtype) * (_FRACTION if dtype == torch.int8 else 1.0)
    return torch.where(maximum > _SMALLEST_MAXIMUM, torch.full_like(maximum, peak) / maximum, 0.0)  # a scalar / tensor rounds twice


def _unit(maximum: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ones_like(maximum) if dtype == torch.bfloat16 else maximum / torch.full_like(maximum, quantizer_peak(dtype))


def _code(scaled: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.int8:
        return encode(scaled, dtype)
    return torch.floor((scaled.round() + noise) / _FRACTION).to(torch.int8)


def ref_column_max(g: Tensor, *, token_weight: Tensor, out: Tensor) -> None:
    """See `column_max`."""
    out.copy_(torch.maximum(out, (g.float().abs() * token_weight[:, None]).amax(0)))


def ref_row_max(g: Tensor, *, segment_units: Tensor | None, out: Tensor) -> None:
    """See `row_max`."""
    size = g.float().abs()
    if segment_units is not None:
        size = size * segment_units.repeat_interleave(g.shape[1] // segment_units.numel())
    out.copy_(size.amax(1))


# -- Triton ------------------------------------------------------------------------------------------------------------
# Numbers are handled in pairs of neighbouring channels: one 32-bit word of bf16, one hash, one 16-bit word of two codes. A tile has the
# shape [R, BM / R, BN / 2] with token = R * second + first, which makes a thread hold R neighbouring tokens of a channel: they lie side by
# side in the transposed copy. With PACK = 4 (then R is not used) a thread makes words of four tokens' codes of a channel, and these are
# exchanged between threads; with PACK = 1 codes are, which triton 3.6 moves one by one. The bits are the same.

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.dither import hash_u32

    @triton.jit
    def factor_of(maximum, PEAK: tl.constexpr):  # type: ignore[no-untyped-def]
        """What a number is multiplied by to become a code; PEAK 0: codes of unit 1."""
        if PEAK == 0.0:
            return tl.full(maximum.shape, 1.0, tl.float32)
        else:
            return tl.where(maximum > 1e-30, tl.div_rn(PEAK, maximum), 0.0)

    @triton.jit
    def unit_of(maximum, PEAK: tl.constexpr):  # type: ignore[no-untyped-def]
        if PEAK == 0.0:
            return tl.full(maximum.shape, 1.0, tl.float32)
        else:
            return tl.div_rn(maximum, PEAK)

    @triton.jit
    def load_pairs(g, at):  # type: ignore[no-untyped-def]
        """Even and odd channels (fp32) of the pairs at positions `at` of g: int32 words of two bf16, or int64 words of two fp32."""
        word = tl.load(g + at)
        if g.dtype.element_ty == tl.int32:
            return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
        else:
            return word.to(tl.int32).to(tl.float32, bitcast=True), (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)

    @triton.jit
    def dithered_pair(even, odd, noise):  # type: ignore[no-untyped-def]
        """Two int8 codes, the even channel's plus 128, in bytes 1 and 3 of int32. even, odd: fp32 in 1/256 of a code; noise: int32, bytes 0
        and 2.

        Adding 1.5 * 2**23 rounds to a whole number, whose bits are then the low bits of the float. The even one is raised by 2**15 (a code
        of 128), so that adding noise to it never carries into the odd one above it; the odd one's constant takes back the 0x4B40 that the
        even float's upper bits add to it."""
        low = (even + 12615680.0).to(tl.int32, bitcast=True)
        high = (odd + 12563648.0).to(tl.int32, bitcast=True)
        return (high << 16) + low + noise

    @triton.jit
    def nearest_pair(even, odd, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
        """Two e4m3 codes in bytes 1 and 3 of int32, or two bf16."""
        if CODE == tl.bfloat16:
            low = even.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
            return (odd.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16) | (low & 0xFFFF)
        else:
            return (e4m3_bits(even) << 8) | (e4m3_bits(odd) << 24)

    @triton.jit
    def stored_pair(pair, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
        """A pair as it is stored: int16, or int32 of bf16; the even channel in the low half."""
        if CODE == tl.bfloat16:
            return pair
        else:
            codes = pair & -16711936
            if CODE == tl.int8:
                codes = codes ^ 0x8000
            return ((codes + (codes << 8)) >> 16).to(tl.int16)

    @triton.jit
    def token_words(first, second, third, fourth, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
        """(even, odd channel's) codes of four tokens side by side, from their pairs: int32, or int64 of bf16."""
        if CODE == tl.bfloat16:
            even = (first & 0xFFFF) | (second << 16)
            odd = ((first >> 16) & 0xFFFF) | (second & -65536)
            even_above = ((third & 0xFFFF) | (fourth << 16)).to(tl.int64) << 32
            odd_above = (((third >> 16) & 0xFFFF) | (fourth & -65536)).to(tl.int64) << 32
            return even_above | (even.to(tl.int64) & 0xFFFFFFFF), odd_above | (odd.to(tl.int64) & 0xFFFFFFFF)
        else:
            below = ((first >> 8) & 0x00FF00FF) | (second & -16711936)  # bytes: even, even, odd, odd
            above = ((third >> 8) & 0x00FF00FF) | (fourth & -16711936)
            even = (below & 0xFFFF) | (above << 16)
            odd = ((below >> 16) & 0xFFFF) | (above & -65536)
            if CODE == tl.int8:
                even = even ^ -2139062144
            return even, odd

    @triton.jit
    def e4m3_bits(value):  # type: ignore[no-untyped-def]
        """`codes.encode` to e4m3 as the byte of the code in int32, by integers: triton 3.6 mixes up bytes that are packed after its own
        conversion (seen on an H100). Nearest even; a NaN stays one."""
        bits = value.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 0x80
        size = tl.minimum(tl.abs(value), 448.0)
        size_bits = size.to(tl.int32, bitcast=True)
        normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - 960  # 8 * (127 - 7): another exponent bias
        small = (size + 24576.0).to(tl.int32, bitcast=True) & 0xF  # 1.5 * 2**14: whole numbers of 2**-9, up to 8
        return tl.where(value != value, 0x7F, tl.where(size < 0.015625, small, normal)) | sign

    @triton.jit
    def quantise(  # type: ignore[no-untyped-def]
        g, codes, row_max, token_weight, row_unit, row, pair, pairs, mixed, segment_unit, even_factor, odd_factor,
        CODE: tl.constexpr, PEAK: tl.constexpr, SCALED: tl.constexpr,
    ):  # fmt: skip
        """Codes by rows of the tokens `row` and channels `pair`, which broadcast to a tile, stored; pairs of their codes by columns."""
        at = row.to(tl.int64) * pairs + pair
        even, odd = load_pairs(g, at)
        maximum = tl.load(row_max + row)
        factor = factor_of(maximum, SCALED) * segment_unit
        weight = tl.load(token_weight + row)
        if tl.program_id(0) == 0:
            tl.store(row_unit + row, unit_of(maximum, PEAK))
        if CODE == tl.int8:
            hashed = hash_u32((row * pairs + pair).to(tl.uint32) ^ mixed)
            by_row = dithered_pair(even * factor, odd * factor, (hashed & 0xFF00FF).to(tl.int32))
            noise = ((hashed >> 8) & 0xFF00FF).to(tl.int32)
            by_column = dithered_pair(even * weight * even_factor, odd * weight * odd_factor, noise)
        else:
            by_row = nearest_pair(even * factor, odd * factor, CODE)
            by_column = nearest_pair(even * weight * even_factor, odd * weight * odd_factor, CODE)
        tl.store(codes + at, stored_pair(by_row, CODE))
        return by_column

    @triton.jit(do_not_specialize=["salt"])
    def rows_and_transpose_kernel(  # type: ignore[no-untyped-def]
        g, row_max, column_max, token_weight, segment_units, seed, salt, codes, row_unit, codes_t, column_unit, M, N, segment_columns,
        CODE: tl.constexpr, PEAK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr,
        STAGES: tl.constexpr, PACK: tl.constexpr,
    ):  # fmt: skip
        """Program (i, j): columns i * BN .. + BN of row tiles j * STEPS .. + STEPS. g, codes, codes_t: pointers to words, see `_launch`."""
        PAIRS: tl.constexpr = BN // 2
        SCALED: tl.constexpr = PEAK * 256.0 if CODE == tl.int8 else PEAK
        HALF: tl.constexpr = 16 if CODE == tl.bfloat16 else 8
        pairs = N // 2
        length = M // PACK
        pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
        mixed = hash_u32(tl.load(seed).to(tl.uint32) ^ (salt.to(tl.uint32) * 0x9E3779B1))  # dither.mixed_seed
        if PACK == 1:
            pair = pair[None, None, :]
            token = tl.arange(0, BM // R)[None, :, None] * R + tl.arange(0, R)[:, None, None]
        else:
            pair = pair[None, :]
            token = tl.arange(0, BM // 4)[:, None] * 4
        even_factor = factor_of(tl.load(column_max + pair * 2), SCALED)
        odd_factor = factor_of(tl.load(column_max + pair * 2 + 1), SCALED)
        segment_unit = 1.0
        if segment_units is not None:
            segment_unit = tl.load(segment_units + tl.program_id(0) * BN // segment_columns)
        if tl.program_id(1) == 0:
            column = tl.program_id(0) * BN + tl.arange(0, BN)
            tl.store(column_unit + column, unit_of(tl.load(column_max + column), PEAK))
        even_row = (tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)[:, None]).to(tl.int64) * 2 * length
        first = tl.program_id(1) * STEPS
        for tile in tl.range(first, min(first + STEPS, M // BM), num_stages=STAGES):
            row = tile * BM + token
            by_column = quantise(
                g, codes, row_max, token_weight, row_unit, row, pair, pairs, mixed, segment_unit, even_factor, odd_factor,
                CODE, PEAK, SCALED,
            )  # fmt: skip
            if PACK == 1:
                transposed = tl.reshape(tl.permute(stored_pair(by_column, CODE), (2, 1, 0)), (PAIRS, BM))
                even, odd = transposed.to(codes_t.dtype.element_ty), (transposed >> HALF).to(codes_t.dtype.element_ty)
            else:
                second = quantise(
                    g, codes, row_max, token_weight, row_unit, row + 1, pair, pairs, mixed, segment_unit, even_factor, odd_factor,
                    CODE, PEAK, SCALED,
                )  # fmt: skip
                third = quantise(
                    g, codes, row_max, token_weight, row_unit, row + 2, pair, pairs, mixed, segment_unit, even_factor, odd_factor,
                    CODE, PEAK, SCALED,
                )  # fmt: skip
                fourth = quantise(
                    g, codes, row_max, token_weight, row_unit, row + 3, pair, pairs, mixed, segment_unit, even_factor, odd_factor,
                    CODE, PEAK, SCALED,
                )  # fmt: skip
                even, odd = token_words(by_column, second, third, fourth, CODE)
                even, odd = tl.trans(even), tl.trans(odd)
            to = even_row + tile * (BM // PACK) + tl.arange(0, BM // PACK)[None, :]
            tl.store(codes_t + to, even)
            tl.store(codes_t + to + length, odd)

    @triton.jit
    def column_max_kernel(  # type: ignore[no-untyped-def]
        g, token_weight, out, N, tiles_of_rows, BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr
    ):
        """out: int32 pointer to the bits of floats >= 0, which compare as their bits do (a NaN is above all)."""
        column = tl.program_id(0) * BN + tl.arange(0, BN)
        largest = tl.zeros((BM, BN), tl.int32)
        first = tl.program_id(1) * STEPS
        for tile in range(first, min(first + STEPS, tiles_of_rows)):
            row = tile * BM + tl.arange(0, BM)
            value = tl.load(g + row[:, None].to(tl.int64) * N + column[None, :]).to(tl.float32)
            largest = tl.maximum(largest, size_bits(value * tl.load(token_weight + row)[:, None]))
        tl.atomic_max(out + column, tl.max(largest, axis=0), sem="relaxed")

    @triton.jit
    def row_max_kernel(g, segment_units, out, N, segment_columns, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0) * BM + tl.arange(0, BM)
        largest = tl.zeros((BM, BN), tl.int32)
        for column in range(0, N, BN):
            value = tl.load(g + row[:, None].to(tl.int64) * N + column + tl.arange(0, BN)[None, :]).to(tl.float32)
            if segment_units is not None:
                value = value * tl.load(segment_units + column // segment_columns)
            largest = tl.maximum(largest, size_bits(value))
        tl.store(out + row, tl.max(largest, axis=1).to(tl.float32, bitcast=True))

    @triton.jit
    def size_bits(value):  # type: ignore[no-untyped-def]
        """|value| of fp32 as int32 bits."""
        return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


def _launch_rows_and_transpose(
    g: Tensor, row_max: Tensor, column_max: Tensor, token_weight: Tensor, segment_units: Tensor | None, seed: Tensor, salt: int,
    codes: Tensor, row_unit: Tensor, codes_t: Tensor, column_unit: Tensor,
) -> None:  # fmt: skip
    rows, columns = g.shape
    config = launch("rows_and_transpose", tiles.capability(g.device), codes.dtype)
    segment_columns = columns if segment_units is None else columns // segment_units.numel()
    config = fitted(config, BM=rows, BN=segment_columns)
    byte_codes = codes.dtype != torch.bfloat16
    peak = quantizer_peak(codes.dtype) if byte_codes else 0.0
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[config["PACK"] * codes.itemsize]
    rows_and_transpose_kernel[(columns // config["BN"], triton.cdiv(rows // config["BM"], config["STEPS"]))](
        g.view(torch.int32 if g.dtype == torch.bfloat16 else torch.int64), row_max, column_max, token_weight, segment_units, seed, salt,
        codes.view(torch.int16 if byte_codes else torch.int32), row_unit,
        codes_t.view(words), column_unit, rows, columns, segment_columns,
        CODE=tiles.TRITON_DTYPES[codes.dtype], PEAK=peak, enable_fp_fusion=False, **config,
    )  # fmt: skip


def _launch_column_max(g: Tensor, token_weight: Tensor, out: Tensor) -> None:
    rows, columns = g.shape
    config = fitted(launch("column_max", tiles.capability(g.device)), BM=rows, BN=columns)
    row_tiles = rows // config["BM"]
    config["STEPS"] = tiles.steps_per_program(config["STEPS"], row_tiles, columns // config["BN"], g.device)
    column_max_kernel[(columns // config["BN"], triton.cdiv(row_tiles, config["STEPS"]))](
        g, token_weight, out.view(torch.int32), columns, row_tiles, enable_fp_fusion=False, **config
    )


def _launch_row_max(g: Tensor, segment_units: Tensor | None, out: Tensor) -> None:
    rows, columns = g.shape
    segment_columns = columns if segment_units is None else columns // segment_units.numel()
    config = fitted(launch("row_max", tiles.capability(g.device)), BM=rows, BN=segment_columns)
    row_max_kernel[(rows // config["BM"],)](g, segment_units, out, columns, segment_columns, enable_fp_fusion=False, **config)


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
    if choose(g.device, backend).name == "triton":
        _launch_rows_and_transpose(g, row_max, column_max, token_weight, segment_units, seed, salt, codes, row_unit, codes_t, column_unit)
        return
    ref_rows_and_transpose(
        g, row_max=row_max, column_max=column_max, token_weight=token_weight, segment_units=segment_units, seed=seed, salt=salt,
        codes=codes, row_unit=row_unit, codes_t=codes_t, column_unit=column_unit,
    )  # fmt: skip


def column_max(g: Tensor, *, token_weight: Tensor, out: Tensor, backend: BackendName | None = None) -> None:
    """out[n] = max(out[n], max_t |g[t, n]| * token_weight[t]): the caller zeroes out. g: bf16 or fp32 [M, N]; fp32 [M]; fp32 [N]."""
    if choose(g.device, backend).name == "triton":
        _launch_column_max(g, token_weight, out)
        return
    ref_column_max(g, token_weight=token_weight, out=out)


def row_max(g: Tensor, *, segment_units: Tensor | None, out: Tensor, backend: BackendName | None = None) -> None:
    """out[t] = max_n |g[t, n]| * segment_unit(n). g: bf16 or fp32 [M, N]; segment_units: fp32 [S] or None; out: fp32 [M], overwritten."""
    if choose(g.device, backend).name == "triton":
        _launch_row_max(g, segment_units, out)
        return
    ref_row_max(g, segment_units=segment_units, out=out)
