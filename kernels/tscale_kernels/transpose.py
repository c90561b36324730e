"""Inputs of a weight gradient, stored transposed.

A normalised operand (`transpose_scaled`, optionally with the ReLU of it) is scaled token by token and requantised by column:
    codes_t[k, t] = nearest(x[t, k] * token_scale[t] / column_unit[k]),    column_unit[k] = max_t |x[t, k]| token_scale[t] / peak
token_scale is the inverse of the weights that the gradient side was multiplied with (`balance.py`), so the two cancel in the product. The
maxima come from a kernel that read x before (`matmul_dgrad.py`); bf16 codes have unit 1 and need none. The products of gate and attention
result (`transpose_products`) are made again with the codes of the forward pass: their gradient side has weight 1, so they need neither
scale nor maxima.

Rows of the transposed products are in the canonical order of the combiner's columns: row h*512 + r*128 + z holds
gate[h, z XOR r] * out[h, z], in natural channels z. (Gate and result come in blocked order, see tscale_fed/model/combiner.py; a transpose
can put rows where it likes.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels import tiles
from tscale_kernels.attention import product_step
from tscale_kernels.codes import encode, vector_scale
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.launch_table import fitted, launch

_PEAK = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_SMALLEST_MAXIMUM = 1e-30
_REPLICAS, _BLOCK = 4, 32

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_transpose_scaled(x: Tensor, *, token_scale: Tensor, relu: bool, column_max: Tensor, codes_t: Tensor, column_unit: Tensor) -> None:
    """See `transpose_scaled`."""
    numbers = torch.where(x.float() < 0, 0.0, x.float()) if relu else x.float()
    scaled, scale = numbers * token_scale[:, None], vector_scale(x.dtype)
    if codes_t.dtype == torch.bfloat16:
        column_unit.fill_(1.0 / scale)
        codes_t.copy_(scaled.T.to(torch.bfloat16))
        return
    peak = _PEAK[codes_t.dtype]
    factor = torch.where(column_max > _SMALLEST_MAXIMUM, torch.full_like(column_max, peak) / column_max, 0.0)
    column_unit.copy_(column_max / torch.full_like(column_max, peak * scale))
    codes_t.copy_(encode(scaled * factor, codes_t.dtype).T)


def ref_transpose_products(gate: Tensor, out: Tensor, *, codes_t: Tensor, column_unit: Tensor, product_scale: float | None = None) -> None:
    """See `transpose_products`."""
    rows = gate.shape[0]
    gate_blocks = gate.float().view(rows, -1, _REPLICAS, 1, _BLOCK)
    step = product_step(gate.dtype, product_scale)
    products = (gate_blocks * out.float().view(rows, -1, 1, _REPLICAS, _BLOCK) / step).flatten(1)  # [M, (h, i, j, m)]
    codes_t.copy_(encode(products.index_select(1, _kernel_columns(codes_t.shape[0], gate.device)), codes_t.dtype).T)
    column_unit.fill_(step / vector_scale(gate.dtype))


def _kernel_columns(columns: int, device: torch.device) -> Tensor:
    """Place h*512 + i*128 + j*32 + m of the product that canonical column h*512 + r*128 + (4m + j), r = i XOR j, reads."""
    column = torch.arange(columns, device=device)
    head, replica, channel = column // 512, column // 128 % 4, column % 128
    m, j = channel // 4, channel % 4
    return head * 512 + (replica ^ j) * 128 + j * 32 + m


# -- Triton ------------------------------------------------------------------------------------------------------------
# Tiles of `transpose_scaled` have the shape [R, BM / R, BN] with token = R * second + first (see `quantize.py`).

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.codes import encode_tile, small_to_float
    from tscale_kernels.quantize import e4m3_bits, factor_of

    @triton.jit
    def store_transposed(scaled, codes_t, row, M, first, CODE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
        """Codes of an fp32 tile [R, BM / R, BN] to rows `row` [BN] and columns first .. + BM of codes_t. |scaled| <= 127.5 for int8."""
        if CODE == tl.int8:
            codes = (scaled + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)  # the bits below 2**23 are the rounded number
        else:
            codes = encode_tile(scaled, CODE)
        transposed = tl.reshape(tl.permute(codes, (2, 1, 0)), (BN, BM))
        tl.store(codes_t + row.to(tl.int64)[:, None] * M + first + tl.arange(0, BM)[None, :], transposed)

    @triton.jit
    def transpose_scaled_kernel(  # type: ignore[no-untyped-def]
        x, token_scale, column_max, codes_t, column_unit, M, N, scale,
        RELU: tl.constexpr, CODE: tl.constexpr, PEAK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
        STEPS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """Program (i, j): columns i * BN .. + BN of row tiles j * STEPS .. + STEPS."""
        row = tl.program_id(0) * BN + tl.arange(0, BN)
        maximum = tl.load(column_max + row)
        if tl.program_id(1) == 0:
            tl.store(column_unit + row, column_unit_of(maximum, scale, PEAK))
        factor = factor_of(maximum, PEAK)[None, None, :]
        token = tl.arange(0, BM // R)[None, :, None] * R + tl.arange(0, R)[:, None, None]
        first = tl.program_id(1) * STEPS
        for tile in tl.range(first, min(first + STEPS, M // BM), num_stages=STAGES):
            value = tl.load(x + (tile * BM + token).to(tl.int64) * N + row[None, None, :]).to(tl.float32)
            if RELU:
                value = tl.where(value < 0, 0.0, value)
            scaled = value * tl.load(token_scale + tile * BM + token) * factor
            store_transposed(scaled, codes_t, row, M, tile * BM, CODE, BM, BN)

    @triton.jit
    def column_unit_of(maximum, scale, PEAK: tl.constexpr):  # type: ignore[no-untyped-def]
        if PEAK == 0.0:
            return tl.div_rn(tl.full(maximum.shape, 1.0, tl.float32), scale)
        else:
            return tl.div_rn(maximum, PEAK * scale)

    @triton.jit
    def four_tokens(x, row_stride):  # type: ignore[no-untyped-def]
        """fp32 tiles of the codes at x and of the three tokens behind them."""
        first, second = small_to_float(tl.load(x)), small_to_float(tl.load(x + row_stride))
        return first, second, small_to_float(tl.load(x + 2 * row_stride)), small_to_float(tl.load(x + 3 * row_stride))

    @triton.jit
    def product_bits(a, b, CODE: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
        """The code of a * b (fp32) as an integer: e4m3 and bf16 in the low bits; int8, plus 128, added to 0x4B400000 (0x4BC00000)."""
        if CODE == tl.int8:
            zero: tl.constexpr = STEP * 12582912.0
            shifted = tl.fma(a, b, tl.full(a.shape, zero + STEP * 128.0, tl.float32))  # see `attention.encode_product`
            return tl.minimum(tl.maximum(shifted, zero), zero + STEP * 255.0).to(tl.int32, bitcast=True)
        elif CODE == tl.float8e4nv:
            return e4m3_bits(a * b)
        else:
            return (a * b).to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.int64)

    @triton.jit
    def product_word(gate, out, CODE: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
        """Codes of four tokens' gate * out side by side, the first token lowest: int32, of bf16 int64. triton 3.6 exchanges single bytes
        between threads one by one, which takes longer than making them."""
        first, second = product_bits(gate[0], out[0], CODE, STEP), product_bits(gate[1], out[1], CODE, STEP)
        third, fourth = product_bits(gate[2], out[2], CODE, STEP), product_bits(gate[3], out[3], CODE, STEP)
        if CODE == tl.bfloat16:
            return first + (second << 16) + (third << 32) + (fourth << 48)
        word = first + second * 256 + (third + fourth * 256) * 65536
        if CODE == tl.int8:
            four: tl.constexpr = 0x0BC00000 if STEP == 2 else -0x74C00000  # modulo 2**32, 0x4BC00000 (0x4B400000) at each of four bytes
            word = (word - four) ^ -2139062144  # and takes 128 back from each byte
        return word

    @triton.jit
    def store_words(  # type: ignore[no-untyped-def]
        to, gate0, gate1, gate2, gate3, out0, out1, out2, out3, words, CODE: tl.constexpr, STEP: tl.constexpr, BM: tl.constexpr
    ):
        """Codes of gate_j * out_j (four tokens each, [BM / 4, 32]) to rows 4m + j of the matrix [.., words] that begins at `to`."""
        even = tl.join(product_word(gate0, out0, CODE, STEP), product_word(gate2, out2, CODE, STEP))
        odd = tl.join(product_word(gate1, out1, CODE, STEP), product_word(gate3, out3, CODE, STEP))
        transposed = tl.reshape(tl.permute(tl.join(even, odd), (1, 2, 3, 0)), (128, BM // 4))
        tl.store(to + tl.arange(0, 128).to(tl.int64)[:, None] * words + tl.arange(0, BM // 4)[None, :], transposed)

    @triton.jit
    def transpose_products_kernel(  # type: ignore[no-untyped-def]
        gate, out, codes_t, column_unit, M, N, unit,
        CODE: tl.constexpr, STEP: tl.constexpr, BM: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
    ):  # fmt: skip
        """Program (h, j): the 512 products of a head in row tiles j * STEPS .. + STEPS. Every number is read once,
        CHANNELS neighbouring ones by a thread. codes_t: pointer to words of four codes."""
        head = tl.program_id(0)
        if tl.program_id(1) == 0:
            tl.store(column_unit + head * 512 + tl.arange(0, 512), tl.full((512,), 1.0, tl.float32) * unit)
        token = tl.arange(0, BM // 4)[:, None] * 4
        channel = head * 128 + tl.max_contiguous(tl.arange(0, 32), CHANNELS)[None, :]
        words = M // 4
        first = tl.program_id(1) * STEPS
        for tile in range(first, min(first + STEPS, M // BM)):
            at = (tile * BM + token).to(tl.int64) * N + channel
            gate0, gate1 = four_tokens(gate + at, N), four_tokens(gate + at + 32, N)
            gate2, gate3 = four_tokens(gate + at + 64, N), four_tokens(gate + at + 96, N)
            out0, out1 = four_tokens(out + at, N), four_tokens(out + at + 32, N)
            out2, out3 = four_tokens(out + at + 64, N), four_tokens(out + at + 96, N)
            to = codes_t + head.to(tl.int64) * 512 * words + tile * (BM // 4)
            store_words(to, gate0, gate1, gate2, gate3, out0, out1, out2, out3, words, CODE, STEP, BM)
            store_words(to + 128 * words, gate1, gate0, gate3, gate2, out0, out1, out2, out3, words, CODE, STEP, BM)
            store_words(to + 256 * words, gate2, gate3, gate0, gate1, out0, out1, out2, out3, words, CODE, STEP, BM)
            store_words(to + 384 * words, gate3, gate2, gate1, gate0, out0, out1, out2, out3, words, CODE, STEP, BM)


def _launch_scaled(x: Tensor, token_scale: Tensor, relu: bool, column_max: Tensor, codes_t: Tensor, column_unit: Tensor) -> None:
    rows, columns = x.shape
    config = fitted(launch("transpose_scaled", tiles.capability(x.device), x.dtype), BM=rows, BN=columns)
    config["STEPS"] = tiles.steps_per_program(config["STEPS"], rows // config["BM"], columns // config["BN"], x.device)
    transpose_scaled_kernel[(columns // config["BN"], triton.cdiv(rows // config["BM"], config["STEPS"]))](
        x, token_scale, column_max, codes_t, column_unit, rows, columns, vector_scale(x.dtype),
        RELU=relu, CODE=tiles.TRITON_DTYPES[x.dtype], PEAK=_PEAK.get(x.dtype, 0.0), enable_fp_fusion=False, **config,
    )  # fmt: skip


def _launch_products(gate: Tensor, out: Tensor, *, codes_t: Tensor, column_unit: Tensor, product_scale: float | None) -> None:
    rows, columns = gate.shape
    config = fitted(launch("transpose_products", tiles.capability(gate.device), gate.dtype), BM=rows)
    step = product_step(gate.dtype, product_scale)
    heads, row_tiles = columns // (_REPLICAS * _BLOCK), rows // config["BM"]
    config["STEPS"] = tiles.steps_per_program(config["STEPS"], row_tiles, heads, gate.device)
    transpose_products_kernel[(heads, triton.cdiv(row_tiles, config["STEPS"]))](
        gate, out, codes_t.view(torch.int64 if gate.dtype == torch.bfloat16 else torch.int32), column_unit, rows, columns,
        step / vector_scale(gate.dtype), CODE=tiles.TRITON_DTYPES[gate.dtype], STEP=step, **config,
    )  # fmt: skip


# -- run ---------------------------------------------------------------------------------------------------------------


def transpose_scaled(
    x: Tensor,
    *,
    token_scale: Tensor,
    relu: bool,
    column_max: Tensor,
    codes_t: Tensor,
    column_unit: Tensor,
    backend: BackendName | None = None,
) -> None:
    """Codes of x * token_scale by columns, transposed.

    x: codes [M, K] whose values are code / vector_scale; relu: take max(x, 0). token_scale: fp32 [M], > 0. column_max: fp32 [K], the
    largest code times token_scale of each column (unused for bf16).
    Writes codes_t [K, M] of x's dtype and column_unit fp32 [K] (which includes 1 / vector_scale). M and K are multiples of 128.
    """
    if choose(x.device, backend).name == "triton":
        _launch_scaled(x, token_scale, relu, column_max, codes_t, column_unit)
        return
    ref_transpose_scaled(x, token_scale=token_scale, relu=relu, column_max=column_max, codes_t=codes_t, column_unit=column_unit)


def transpose_products(
    gate: Tensor,
    out: Tensor,
    *,
    codes_t: Tensor,
    column_unit: Tensor,
    product_scale: float | None = None,
    backend: BackendName | None = None,
) -> None:
    """Codes of the products gate * out, those of the forward pass, transposed, rows in the canonical order of combiner columns.

    gate: codes [M, A] in blocked channel order; out: bf16 [M, A], the attention result in blocked order.
    Writes codes_t [4A, M] of gate's dtype and column_unit fp32 [4A], 1 / product_scale everywhere (None: the gate's scale; see `attend`).
    M and A are multiples of 128.
    """
    run = _launch_products if choose(gate.device, backend).name == "triton" else ref_transpose_products
    run(gate, out, codes_t=codes_t, column_unit=column_unit, product_scale=product_scale)
