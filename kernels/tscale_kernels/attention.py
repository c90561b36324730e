"""Attention forward: enters codes of queries, keys, values and gates, leaves the attended values and the combiner's input.

Rule (TScale; tscale_fed/model/attention.py), in base 2; t sees s with max(start of its document, t - width) <= s <= t - 1:
    logit(t, s) = 0.5 / (sqrt(128) ln 2) * query_t . key_s - slope * (t - s)          query of unit RMS, key = code / scale * its rms
    log_sum(t) = log2(1 + sum_s 2^logit(t, s))                                        the 1 is the sink: a zero value with logit 0
    out(t) = sum_s 2^(logit(t, s) - log_sum(t)) * value_s                             rounded to bf16
    products(t)[h, i, z] = gate(t)[h, 32 i + z % 32] * out(t)[h, z], i = 0..3         codes; order of combiner.blocked_columns
A token that sees nothing gets 0 and log_sum 0. Products are made of the rounded `out`, so whoever keeps gate and out can make them again.
Their codes have the gate's scale or, as int8, half of it (`codes.product_scale`).

Fragments are runs of T rows; the last may be shorter (rows that only fill up a multiple of 128: their codes are 0, so are their results).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tscale_kernels import codes
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.head_gradient import HEAD_CHANNELS, KEY, heads_of, segment_rms, working_dtype
from tscale_kernels.launch_table import launch

LOGIT_SCALE = 0.5 / math.sqrt(HEAD_CHANNELS)
"""Natural logit of query . key = 1."""
PRODUCTS_PER_CHANNEL = 4
_GATE_BLOCK = HEAD_CHANNELS // PRODUCTS_PER_CHANNEL

LOCAL_WIDTH = 128
"""Widths up to this one have launch configurations of their own (names ending in _local): one or two key blocks a program."""

_REF_SCORES = 1 << 26
"""Scores (elements) that the reference holds at a time: it goes through fragments in chunks."""


# -- reference ---------------------------------------------------------------------------------------------------------


def by_fragment(x: Tensor, tokens: int) -> Tensor:
    """[M, ...] -> [fragments, T, ...], the last fragment filled up with zeros."""
    missing = -x.shape[0] % tokens
    if missing:
        x = torch.cat((x, x.new_zeros(missing, *x.shape[1:])))
    return x.unflatten(0, (-1, tokens))


def fragments_per_chunk(heads: int, tokens: int) -> int:
    return max(1, _REF_SCORES // (heads * tokens * tokens))


def ref_logits(query: Tensor, key: Tensor, start: Tensor | None, width: int, slope: float) -> Tensor:
    """Base-2 logits [f, H, T, T] of unit queries and true keys [f, T, H, 128]; -inf where t does not see s. start [f, T] or None."""
    index = torch.arange(query.shape[1], device=query.device)
    distance = index[:, None] - index[None, :]
    allowed = ((distance >= 1) & (distance <= width))[None, None]
    if start is not None:
        allowed = allowed & (index >= start[:, None, :, None])
    scores = torch.einsum("fthc,fshc->fhts", query, key) * (LOGIT_SCALE / math.log(2.0))
    return (scores - slope * distance.to(scores.dtype)).masked_fill(~allowed, -math.inf)


def ref_products(gate: Tensor, out: Tensor, products: Tensor, product_scale: float | None = None) -> None:
    """products [M, 4A] = codes of the blocked outer product of gate codes [M, A] and out [M, A]; their scale is the gate's if None."""
    dtype = working_dtype(out, products)
    blocks = gate.unflatten(1, (-1, PRODUCTS_PER_CHANNEL, 1, _GATE_BLOCK)).to(dtype)
    pairs = blocks * out.unflatten(1, (-1, 1, PRODUCTS_PER_CHANNEL, _GATE_BLOCK)).to(dtype)
    scaled = pairs.flatten(1) / product_step(gate.dtype, product_scale)
    products.copy_(codes.encode(scaled, products.dtype) if products.dtype in codes.CODE_DTYPES else scaled)


def product_step(gate: torch.dtype, product_scale: float | None) -> int:
    """The gate's scale over that of products (None: 1). Raises ValueError if it is not 1 or, of int8, 2: kernels know these, both exact."""
    step = 1.0 if product_scale is None else codes.vector_scale(gate) / product_scale
    if step != 1 and (step != 2 or gate != torch.int8):
        raise ValueError(
            f"products of {gate} gates with scale {product_scale}: it must be {codes.vector_scale(gate)} or, of int8, half of it"
        )
    return int(step)


def ref_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rms: Tensor,
    gate: Tensor,
    *,
    tokens: int,
    width: int,
    slope: float,
    document_start: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    products: Tensor,
    product_scale: float | None = None,
) -> None:
    """See `attend`. fp64 tensors are taken as codes too (scale 24): tests compare with autograd."""
    rows, dtype = query.shape[0], working_dtype(query, rms)
    true_key = heads_of(key, dtype) * segment_rms(rms, KEY)[:, :, None].to(dtype)
    q, k, v = (by_fragment(x, tokens) for x in (heads_of(query, dtype), true_key, heads_of(value, dtype)))
    start = None if document_start is None else by_fragment(document_start, tokens)
    chunk = fragments_per_chunk(q.shape[2], tokens)
    for first in range(0, q.shape[0], chunk):
        some = slice(first, first + chunk)
        logits = ref_logits(q[some], k[some], None if start is None else start[some], width, slope)
        peak = logits.amax(3, keepdim=True).clamp_min(0.0)  # 0 is the sink's logit
        weights = torch.exp2(logits - peak)
        total = weights.sum(3, keepdim=True) + torch.exp2(-peak)
        here = slice(first * tokens, min(rows, (first + chunk) * tokens))
        attended = torch.einsum("fhts,fshc->fthc", weights / total, v[some])
        out[here] = attended.flatten(0, 1).flatten(1)[: here.stop - here.start].to(out.dtype)
        log_sum[:, here] = (peak + total.log2())[..., 0].transpose(0, 1).flatten(1)[:, : here.stop - here.start].to(log_sum.dtype)
    ref_products(gate, out, products, product_scale)


# -- Triton ------------------------------------------------------------------------------------------------------------
# One program attends for BQ queries of one head. It visits key blocks that some of them see, and masks those that not all see whole.
# Logits are kept shifted by slope * (t - first query), so that a slope costs one addition per element.

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.codes import encode_tile, small_to_float
    from tscale_kernels.tiles import TRITON_DTYPES, capability, operand, uses_tma

    @triton.jit
    def program_place(block_count, heads):  # type: ignore[no-untyped-def]
        """(block, head, fragment) of this program. Late query blocks see most keys and start first."""
        program = tl.program_id(0)
        rest = program // block_count
        return block_count - 1 - program % block_count, rest % heads, rest // heads

    @triton.jit
    def load_head(x, row, head, heads, rows, ROWS: tl.constexpr, TMA: tl.constexpr):  # type: ignore[no-untyped-def]
        """[ROWS, 128] of one head from `row` on; rows behind the last one of the matrix are 0."""
        if TMA:
            return x.load([row, head * 128])
        else:
            o_row = row + tl.arange(0, ROWS)
            p_tile = x + o_row[:, None].to(tl.int64) * (heads * 128) + head * 128 + tl.arange(0, 128)[None, :]
            return tl.load(p_tile, mask=(o_row < rows)[:, None], other=0.0)

    @triton.jit
    def row_mask(position, length, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
        """Which positions lie in the fragment; all, known ahead of time, if EVEN."""
        if EVEN:
            return tl.full(position.shape, True, tl.int1)
        else:
            return position < length

    @triton.jit
    def opaque_zero(rms):  # type: ignore[no-untyped-def]
        """int32 0, which the compiler cannot know; rms: a pointer to numbers >= 0. Positions that are computed with it after a loop do not
        take registers during the loop."""
        return (tl.load(rms) < 0).to(tl.int32)

    @triton.jit
    def held(tile, zero):  # type: ignore[no-untyped-def]
        """The same tile as a result of arithmetic: as the left operand of products it waits in registers, not in shared memory, whose
        bandwidth is what bounds products of 64 columns on sm_90. LEFT = 2 in the launch table asks for it, 1 does not."""
        if tile.dtype == tl.int8:
            return tile + zero.to(tl.int8)
        else:
            return (tile.to(tl.float32) + zero.to(tl.float32)).to(tile.dtype)

    @triton.jit
    def score_tile(a, b):  # type: ignore[no-untyped-def]
        """a [R, 128] times b [C, 128] transposed, exact for int8 -> fp32 [R, C]."""
        if a.dtype == tl.int8:
            return tl.dot(a, b.T, out_dtype=tl.int32).to(tl.float32)
        else:
            return tl.dot(a, b.T, out_dtype=tl.float32)

    @triton.jit
    def sees(o_query, o_key, start, width, DOCUMENTS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Who sees whom, of positions in the fragment that broadcast to a tile; start: of the queries' documents."""
        seen = (o_key < o_query) & (o_query - o_key <= width)
        if DOCUMENTS:
            seen = seen & (o_key >= start)
        return seen

    @triton.jit
    def key_ranges(first_query, length, start, width, BQ: tl.constexpr, BKV: tl.constexpr, EDGES: tl.constexpr):  # type: ignore[no-untyped-def]
        """Keys that a block of queries visits, as (first, end of the window's far edge, end of the unmasked blocks, end): the first and the
        last of the three ranges need masks. start: of the first query's document."""
        first = max(start, first_query - width)
        last = min(first_query + BQ - 1, length - 1)
        if EDGES == 2:
            return first, first, first, last
        inner_end = first + (first_query - first) // BKV * BKV
        if EDGES == 0:
            return first, first, inner_end, last
        edge_end = min(first + tl.cdiv(max(0, first_query + BQ - 1 - width - first), BKV) * BKV, inner_end)
        return first, edge_end, inner_end, last

    @triton.jit
    def attend_blocks(  # type: ignore[no-untyped-def]
        query_tile, peak, total, result, key, value, key_rms, o_query, start, first, last,
        row, rows, head, heads, first_query, width, slope, logit_scale,
        BKV: tl.constexpr, MASKED: tl.constexpr, SLOPED: tl.constexpr, DOCUMENTS: tl.constexpr, TMA: tl.constexpr,
    ):  # fmt: skip
        """The online softmax over key blocks first, first + BKV, ... below `last` (positions in the fragment that begins at `row`)."""
        for block in tl.range(first, last, BKV):
            o_key = block + tl.arange(0, BKV)
            key_tile = load_head(key, row + block, head, heads, rows, BKV, TMA)
            factor = tl.load(key_rms + row + o_key, mask=row + o_key < rows, other=0.0) * logit_scale
            logits = score_tile(query_tile, key_tile) * factor[None, :]
            if SLOPED:
                logits += (slope * (o_key - first_query).to(tl.float32))[None, :]
            if MASKED:
                seen = sees(o_query[:, None], o_key[None, :], start[:, None], width, DOCUMENTS)
                logits = tl.where(seen, logits, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(logits, 1))
            weights = tl.exp2(logits - new_peak[:, None])
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(weights, 1)
            peak = new_peak
            value_tile = load_head(value, row + block, head, heads, rows, BKV, TMA)
            if value_tile.dtype != tl.bfloat16:
                value_tile = value_tile.to(tl.float16)  # e4m3 in the wrong order for fp8 tensor cores; exact in fp16, and quick to make
            result = tl.dot(weights.to(value_tile.dtype), value_tile, result * shrink[:, None])
        return peak, total, result

    @triton.jit
    def encode_product(a, b, CODE: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
        """Code of a * b (fp32, exact) in units of STEP, 1 or 2 (int8). int8: STEP * 1.5 * 2**23 is added, which rounds to the nearest even
        multiple of STEP and leaves that multiple in the low bits: 4 instructions an element instead of 7, among them a slow one."""
        if CODE == tl.int8:
            zero: tl.constexpr = STEP * 12582912.0
            shifted = tl.fma(a, b, tl.full(a.shape, zero, tl.float32))
            limited = tl.minimum(tl.maximum(shifted, zero - STEP * 128.0), zero + STEP * 127.0)
            return limited.to(tl.int32, bitcast=True).to(tl.int8)
        else:
            return encode_tile(a * b, CODE)

    @triton.jit
    def store_products(  # type: ignore[no-untyped-def]
        out_tile, gate, products, o_row, m_row, head, heads, CODE: tl.constexpr, STEP: tl.constexpr
    ):
        """Codes of the outer product of a head's gate and out_tile [R, 128] (fp32, as stored), rows o_row."""
        o_channel = tl.arange(0, 128)
        o_gate = o_row[:, None].to(tl.int64) * (heads * 128) + head * 128
        p_product = products + o_row[:, None].to(tl.int64) * (heads * 512) + head * 512 + o_channel[None, :]
        for i in tl.static_range(4):
            gate_tile = small_to_float(tl.load(gate + o_gate + (i * 32 + o_channel % 32)[None, :], mask=m_row[:, None]))
            tl.store(p_product + i * 128, encode_product(gate_tile, out_tile, CODE, STEP), mask=m_row[:, None])

    @triton.jit
    def attend_kernel(  # type: ignore[no-untyped-def]
        query, key, value, key_rms, gate, document_start, out, log_sum, products,
        rows, tokens, heads, width, slope, logit_scale, value_scale,
        BQ: tl.constexpr, BKV: tl.constexpr, EDGES: tl.constexpr, SLOPED: tl.constexpr, DOCUMENTS: tl.constexpr, TMA: tl.constexpr,
        EVEN: tl.constexpr, CODE: tl.constexpr, STEP: tl.constexpr, LEFT: tl.constexpr = 1,
    ):  # fmt: skip
        """See `attend`. query [BQ, 128], key and value [BKV, 128] descriptors or pointers; EDGES as `edges`, EVEN as `is_even`, STEP as
        `encode_product`, LEFT as `held` says."""
        block, head, fragment = program_place(tl.cdiv(tokens, BQ), heads)
        row = fragment * tokens
        length = min(tokens, rows - row)
        first_query = block * BQ
        if first_query >= length:
            return
        o_query = first_query + tl.arange(0, BQ)
        o_row, m_row = row + o_query, row_mask(o_query, length, EVEN)
        start, first_start = tl.zeros((BQ,), tl.int32), 0
        if DOCUMENTS:
            start = tl.load(document_start + o_row, mask=m_row, other=0)
            first_start = tl.load(document_start + row + first_query)
        first, edge_end, inner_end, last = key_ranges(first_query, length, first_start, width, BQ, BKV, EDGES)
        query_tile = load_head(query, row + first_query, head, heads, rows, BQ, TMA)
        if LEFT == 2:
            query_tile = held(query_tile, opaque_zero(key_rms))
        shift = slope * (o_query - first_query).to(tl.float32)
        peak, total, result = shift, tl.full((BQ,), 1.0, tl.float32), tl.zeros((BQ, 128), tl.float32)
        head_rms = key_rms + head.to(tl.int64) * rows
        if EDGES == 1:
            peak, total, result = attend_blocks(
                query_tile, peak, total, result, key, value, head_rms, o_query, start, first, edge_end,
                row, rows, head, heads, first_query, width, slope, logit_scale, BKV, True, SLOPED, DOCUMENTS, TMA,
            )  # fmt: skip
        if EDGES < 2:
            peak, total, result = attend_blocks(
                query_tile, peak, total, result, key, value, head_rms, o_query, start, edge_end, inner_end,
                row, rows, head, heads, first_query, width, slope, logit_scale, BKV, False, SLOPED, DOCUMENTS, TMA,
            )  # fmt: skip
        peak, total, result = attend_blocks(
            query_tile, peak, total, result, key, value, head_rms, o_query, start, inner_end, last,
            row, rows, head, heads, first_query, width, slope, logit_scale, BKV, True, SLOPED, DOCUMENTS, TMA,
        )  # fmt: skip
        tl.store(log_sum + head.to(tl.int64) * rows + o_row, peak + tl.log2(total) - shift, mask=m_row)
        out_tile = (result * (value_scale / total)[:, None]).to(tl.bfloat16)
        p_out = out + o_row[:, None].to(tl.int64) * (heads * 128) + head * 128 + tl.arange(0, 128)[None, :]
        tl.store(p_out, out_tile, mask=m_row[:, None])
        # Reading the rows again gives their tile the layout of loads and stores. From the accumulator's, triton would move every gate and
        # every product through shared memory.
        tl.debug_barrier()
        out_tile = tl.load(p_out, mask=m_row[:, None])
        store_products(out_tile.to(tl.float32), gate, products, o_row, m_row, head, heads, CODE, STEP)


# -- launch ------------------------------------------------------------------------------------------------------------


def edges(tokens: int, width: int, documents: bool, block_queries: int, block_keys: int) -> int:
    """Where masks are needed besides the diagonal: 0 nowhere, 1 at the far end of the window, 2 everywhere."""
    if documents or block_queries + block_keys > width < tokens:
        return 2
    return 1 if width < tokens else 0


def is_even(rows: int, tokens: int, block: int) -> bool:
    """Whether blocks of this many rows never cross the end of a fragment."""
    return tokens % block == 0 and rows % tokens == 0


def loads_by_descriptor(device: torch.device) -> bool:
    """Whether attention takes descriptors on `device`. On sm_120, which multiplies from registers, what a descriptor loaded before the loop
    would stay in registers and spill."""
    return uses_tma(device) and capability(device)[0] in (9, 10)


def operation(name: str, tokens: int, width: int) -> str:
    """Row of the launch table: windows much shorter than a fragment have their own."""
    return f"{name}_local" if width < tokens and width <= LOCAL_WIDTH else name


def _launch_attend(
    query: Tensor, key: Tensor, value: Tensor, rms: Tensor, gate: Tensor, *, tokens: int, width: int, slope: float,
    document_start: Tensor | None, out: Tensor, log_sum: Tensor, products: Tensor, product_scale: float | None,
) -> None:  # fmt: skip
    rows, heads = query.shape[0], query.shape[1] // HEAD_CHANNELS
    config = launch(operation("attend", tokens, width), capability(query.device), query.dtype)
    tma, documents = loads_by_descriptor(query.device), document_start is not None
    block_queries, block_keys = config["BQ"], config["BKV"]
    logit_scale = LOGIT_SCALE / math.log(2.0) / (codes.vector_scale(query.dtype) * codes.vector_scale(key.dtype))
    grid = (triton.cdiv(tokens, block_queries) * heads * triton.cdiv(rows, tokens),)
    attend_kernel[grid](
        operand(query, block_queries, HEAD_CHANNELS, tma), operand(key, block_keys, HEAD_CHANNELS, tma),
        operand(value, block_keys, HEAD_CHANNELS, tma), rms[KEY * heads :], gate, document_start if documents else rms, out, log_sum,
        products,
        rows, tokens, heads, min(width, tokens), slope, logit_scale, 1.0 / codes.vector_scale(value.dtype),
        EDGES=edges(tokens, width, documents, block_queries, block_keys), SLOPED=slope != 0.0, DOCUMENTS=documents, TMA=tma,
        EVEN=is_even(rows, tokens, block_queries), CODE=TRITON_DTYPES[products.dtype], STEP=product_step(gate.dtype, product_scale),
        **config,
    )  # fmt: skip


# -- run ---------------------------------------------------------------------------------------------------------------


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rms: Tensor,
    gate: Tensor,
    *,
    tokens: int,
    width: int,
    slope: float,
    document_start: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    products: Tensor,
    product_scale: float | None = None,
    backend: BackendName | None = None,
) -> None:
    """Attention of one layer, and the combiner's input.

    query, key: [M, A] int8, e4m3 or bf16 codes of unit-RMS vectors, rotated. value: [M, A] bf16 or e4m3. gate: [M, A] codes of the
    dtype of products.
    rms: fp32 [4H, M], of which the key rows H..2H-1 are read. tokens: T, length of a fragment. width: tokens seen, at least 1.
    slope: base-2 units per token. document_start: int32 [M], position in the fragment where the row's document starts, or None.
    Writes out bf16 [M, A], log_sum fp32 [H, M], products [M, 4A] codes of product_scale (None: the gate's; int8 also half of it).
    Raises ValueError for other scales.
    """
    attend_here = _launch_attend if choose(query.device, backend).name == "triton" else ref_attend
    attend_here(
        query, key, value, rms, gate, tokens=tokens, width=width, slope=slope, document_start=document_start,
        out=out, log_sum=log_sum, products=products, product_scale=product_scale,
    )  # fmt: skip
