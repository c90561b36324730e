"""Attention backward: enters the gradient of the attention result, leaves the gradients of the query, key and value projections.

With weight(t, s) = 2^(logit(t, s) - log_sum(t)) made again from the same codes (attention.py says what a logit is and who sees whom):
    dS(t, s) = weight(t, s) * (d_out_t . value_s - delta_t)        delta_t = out_t . d_out_t; the sink's value is zero: no term
    d_query_t = c sum_s dS(t, s) key_s,   d_key_s = c sum_t dS(t, s) query_t,   c = 0.5 / sqrt(128)
    d_value_s = sum_t weight(t, s) d_out_t
Then head_gradient.py: normalise (query, value), rotation (query, key), statistics. Keys are true keys (code / scale * rms) in
the products, and their gradient is that of the true key: the projection's output, turned back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tscale_kernels import codes
from tscale_kernels.attention import (
    LOGIT_SCALE,
    by_fragment,
    edges,
    fragments_per_chunk,
    is_even,
    loads_by_descriptor,
    operation,
    ref_logits,
)
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.head_gradient import (
    HEAD_CHANNELS,
    KEY,
    QUERY,
    VALUE,
    SegmentStore,
    heads_of,
    ref_rotate_back,
    ref_store,
    ref_through_normalise,
    segment_rms,
    working_dtype,
)
from tscale_kernels.launch_table import Config, launch

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rms: Tensor,
    *,
    d_out: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    cosine: Tensor,
    sine: Tensor,
    tokens: int,
    width: int,
    slope: float,
    document_start: Tensor | None,
    store: SegmentStore,
) -> None:
    """See `attend_backward`."""
    rows, dtype = query.shape[0], working_dtype(query, rms)
    unit_query, unit_value = heads_of(query, dtype), heads_of(value, dtype)
    true_key = heads_of(key, dtype) * segment_rms(rms, KEY)[:, :, None].to(dtype)
    q, k, v = (by_fragment(x, tokens) for x in (unit_query, true_key, unit_value))
    gradient = by_fragment(d_out.to(dtype).view_as(unit_query), tokens)
    sums, deltas = (by_fragment(x.T.to(dtype), tokens).transpose(1, 2)[..., None] for x in (log_sum, delta))
    start = None if document_start is None else by_fragment(document_start, tokens)
    d_query, d_key, d_value = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    chunk = fragments_per_chunk(q.shape[2], tokens)
    for first in range(0, q.shape[0], chunk):
        some = slice(first, first + chunk)
        weights = torch.exp2(ref_logits(q[some], k[some], None if start is None else start[some], width, slope) - sums[some])
        d_scores = weights * (torch.einsum("fthc,fshc->fhts", gradient[some], v[some]) - deltas[some]) * LOGIT_SCALE
        d_query[some] = torch.einsum("fhts,fshc->fthc", d_scores, k[some])
        d_key[some] = torch.einsum("fhts,fthc->fshc", d_scores, q[some])
        d_value[some] = torch.einsum("fhts,fthc->fshc", weights, gradient[some])
    d_query, d_key, d_value = (x.flatten(0, 1)[:rows] for x in (d_query, d_key, d_value))
    ref_store_attention(d_query, d_key, d_value, unit_query, unit_value, rms, cosine, sine, store)


def ref_store_attention(
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    query: Tensor,
    value: Tensor,
    rms: Tensor,
    cosine: Tensor,
    sine: Tensor,
    store: SegmentStore,
) -> None:
    """Gradients of unit queries, true keys and unit values, all [M, H, 128], into their segments."""
    inward = ref_through_normalise(d_query, query, segment_rms(rms, QUERY))
    ref_store(QUERY, ref_rotate_back(inward, cosine, sine), store)
    ref_store(KEY, ref_rotate_back(d_key, cosine, sine), store)
    ref_store(VALUE, ref_through_normalise(d_value, value, segment_rms(rms, VALUE)), store)


# -- Triton ------------------------------------------------------------------------------------------------------------
# Two kernels, so that no sum depends on the order of programs: one goes over the keys of BQ queries, one over the queries of BKV keys. Both
# make scores from the codes as `attend` does; what multiplies a gradient is bf16 (8-bit codes are exact in it), sums are fp32.

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.attention import held, key_ranges, load_head, opaque_zero, program_place, row_mask, score_tile, sees
    from tscale_kernels.codes import small_to_float
    from tscale_kernels.head_gradient import rotate_back, store_gradient, through_normalise
    from tscale_kernels.tiles import capability, operand

    @triton.jit
    def query_gradient_blocks(  # type: ignore[no-untyped-def]
        query_tile, d_out_tile, result, shift, minus_delta, key, value, key_rms, o_query, start, first, last,
        row, rows, head, heads, first_query, width, slope, logit_scale,
        BQ: tl.constexpr, BKV: tl.constexpr, MASKED: tl.constexpr, SLOPED: tl.constexpr, DOCUMENTS: tl.constexpr, TMA: tl.constexpr,
    ):  # fmt: skip
        """result + sum over the keys first .. last - 1 of dS * rms * key code, [BQ, 128], dS in value codes. shift [BQ]: log_sum, in
        shifted logits. minus_delta [BQ]: in value codes."""
        for block in tl.range(first, last, BKV):
            o_key = block + tl.arange(0, BKV)
            key_tile = load_head(key, row + block, head, heads, rows, BKV, TMA)
            value_tile = load_head(value, row + block, head, heads, rows, BKV, TMA)
            root = tl.load(key_rms + row + o_key, mask=row + o_key < rows, other=0.0)
            logits = score_tile(query_tile, key_tile) * (root * logit_scale)[None, :]
            if SLOPED:
                logits += (slope * (o_key - first_query).to(tl.float32))[None, :]
            weights = tl.exp2(logits - shift[:, None])
            if MASKED:
                weights = tl.where(sees(o_query[:, None], o_key[None, :], start[:, None], width, DOCUMENTS), weights, 0.0)
            start_sum = tl.broadcast_to(minus_delta[:, None], (BQ, BKV))
            d_scores = weights * tl.dot(d_out_tile, value_tile.to(tl.bfloat16).T, start_sum) * root[None, :]
            result = tl.dot(d_scores.to(tl.bfloat16), key_tile.to(tl.bfloat16), result)
        return result

    @triton.jit
    def query_gradient_kernel(  # type: ignore[no-untyped-def]
        query, key, value, query_codes, rms, d_out, log_sum, delta, cosine, sine, document_start,
        units, token_weight, d_projected, row_max, column_max,
        rows, tokens, heads, width, slope, logit_scale, score_scale, query_scale, value_scale,
        BQ: tl.constexpr, BKV: tl.constexpr, EDGES: tl.constexpr, SLOPED: tl.constexpr, DOCUMENTS: tl.constexpr, TMA: tl.constexpr,
        EVEN: tl.constexpr, LEFT: tl.constexpr = 1,
    ):  # fmt: skip
        """The query segment. query and d_out [BQ, 128], key and value [BKV, 128] descriptors or pointers; d_projected [BQ, 128] a
        descriptor if TMA and EVEN. LEFT: see `held`."""
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
        d_out_tile = load_head(d_out, row + first_query, head, heads, rows, BQ, TMA)
        if LEFT == 2:
            query_tile, d_out_tile = held(query_tile, opaque_zero(rms)), held(d_out_tile, opaque_zero(rms))
        o_sum = head.to(tl.int64) * rows + o_row
        shift = tl.load(log_sum + o_sum, mask=m_row, other=0.0) + slope * (o_query - first_query).to(tl.float32)
        minus_delta = tl.load(delta + o_sum, mask=m_row, other=0.0) / -value_scale
        key_rms = rms + (heads + head).to(tl.int64) * rows
        result = tl.zeros((BQ, 128), tl.float32)
        if EDGES == 1:
            result = query_gradient_blocks(
                query_tile, d_out_tile, result, shift, minus_delta, key, value, key_rms, o_query, start, first, edge_end,
                row, rows, head, heads, first_query, width, slope, logit_scale, BQ, BKV, True, SLOPED, DOCUMENTS, TMA,
            )  # fmt: skip
        if EDGES < 2:
            result = query_gradient_blocks(
                query_tile, d_out_tile, result, shift, minus_delta, key, value, key_rms, o_query, start, edge_end, inner_end,
                row, rows, head, heads, first_query, width, slope, logit_scale, BQ, BKV, False, SLOPED, DOCUMENTS, TMA,
            )  # fmt: skip
        result = query_gradient_blocks(
            query_tile, d_out_tile, result, shift, minus_delta, key, value, key_rms, o_query, start, inner_end, last,
            row, rows, head, heads, first_query, width, slope, logit_scale, BQ, BKV, True, SLOPED, DOCUMENTS, TMA,
        )  # fmt: skip
        zero = opaque_zero(rms)
        row, head, first_query = row + zero, head + zero, first_query + zero
        o_query = first_query + tl.arange(0, BQ)
        o_row, m_row = row + o_query, row_mask(o_query, length, EVEN)
        unit = small_to_float(load_head_codes(query_codes, o_row, m_row, head, heads)) * query_scale
        result = through_normalise(result * (score_scale * value_scale), unit, rms + head.to(tl.int64) * rows, o_row, m_row)
        result = rotate_back(result, cosine, sine, o_query, m_row, BQ)
        store_gradient(
            result, d_projected, row_max, column_max, units, token_weight, row + first_query, o_row, m_row, 0, head, heads, TMA and EVEN,
        )  # fmt: skip

    @triton.jit
    def load_head_codes(x, o_row, m_row, head, heads):  # type: ignore[no-untyped-def]
        """Rows o_row of one head, [R, 128], from a pointer."""
        p_tile = x + o_row[:, None].to(tl.int64) * (heads * 128) + head * 128 + tl.arange(0, 128)[None, :]
        return tl.load(p_tile, mask=m_row[:, None], other=0.0)

    @triton.jit
    def query_ranges(first_key, length, width, BQ: tl.constexpr, BKV: tl.constexpr, EDGES: tl.constexpr):  # type: ignore[no-untyped-def]
        """Queries that see a block of keys, as (first, end of the diagonal, end of the unmasked blocks, end): the first and the last of the
        three ranges need masks."""
        last = min(length, first_key + BKV + width)
        if EDGES == 2:
            return first_key, first_key, first_key, last
        diagonal_end = first_key + tl.cdiv(BKV, BQ) * BQ
        inner_end = diagonal_end + max(0, min(length, first_key + width + 1) - diagonal_end) // BQ * BQ
        return first_key, diagonal_end, inner_end, last

    @triton.jit
    def key_gradient_blocks(  # type: ignore[no-untyped-def]
        key_tile, value_tile, d_key, d_value, factor, query, d_out, log_sum, delta, document_start, o_key, first, last,
        row, rows, length, head, heads, first_key, width, slope, value_code,
        BQ: tl.constexpr, BKV: tl.constexpr, MASKED: tl.constexpr, SLOPED: tl.constexpr, DOCUMENTS: tl.constexpr, TMA: tl.constexpr,
    ):  # fmt: skip
        """(d_key + sum over the queries first .. last - 1 of dS * query code, d_value + sum of weight * d_out), both [BKV, 128], dS in
        value codes. value_code: that of the value 1."""
        if SLOPED:
            lift = slope * (o_key - first_key).to(tl.float32)
        for block in tl.range(first, last, BQ):
            o_query = block + tl.arange(0, BQ)
            m_query = o_query < length
            query_tile = load_head(query, row + block, head, heads, rows, BQ, TMA)
            d_out_tile = load_head(d_out, row + block, head, heads, rows, BQ, TMA)
            shift = tl.load(log_sum + row + o_query, mask=m_query, other=0.0)
            delta_tile = tl.load(delta + row + o_query, mask=m_query, other=0.0) * value_code
            logits = score_tile(key_tile, query_tile) * factor[:, None]
            if SLOPED:
                shift += slope * (o_query - first_key).to(tl.float32)
                logits += lift[:, None]
            weights = tl.exp2(logits - shift[None, :])
            if MASKED:
                start = o_query
                if DOCUMENTS:
                    start = tl.load(document_start + row + o_query, mask=m_query, other=0)
                seen = sees(o_query[None, :], o_key[:, None], start[None, :], width, DOCUMENTS) & m_query[None, :]
                weights = tl.where(seen, weights, 0.0)
            d_value = tl.dot(weights.to(tl.bfloat16), d_out_tile, d_value)
            d_scores = weights * (tl.dot(value_tile, d_out_tile.T) - delta_tile[None, :])
            d_key = tl.dot(d_scores.to(tl.bfloat16), query_tile.to(tl.bfloat16), d_key)
        return d_key, d_value

    @triton.jit
    def key_gradient_kernel(  # type: ignore[no-untyped-def]
        query, key, value, rms, d_out, log_sum, delta, cosine, sine, document_start,
        units, token_weight, d_projected, row_max, column_max,
        rows, tokens, heads, width, slope, logit_scale, score_scale, value_scale,
        BQ: tl.constexpr, BKV: tl.constexpr, EDGES: tl.constexpr, SLOPED: tl.constexpr, DOCUMENTS: tl.constexpr, TMA: tl.constexpr,
        EVEN: tl.constexpr,
    ):  # fmt: skip
        """The key and value segments. query and d_out [BQ, 128], key and value [BKV, 128] descriptors or pointers; d_projected [BKV, 128] a
        descriptor if TMA and EVEN."""
        key_blocks = tl.cdiv(tokens, BKV)
        block, head, fragment = program_place(key_blocks, heads)
        first_key = (key_blocks - 1 - block) * BKV  # early keys are seen by most queries: they start first
        row = fragment * tokens
        length = min(tokens, rows - row)
        if first_key >= length:
            return
        o_key = first_key + tl.arange(0, BKV)
        o_row, m_row = row + o_key, row_mask(o_key, length, EVEN)
        first, diagonal_end, inner_end, last = query_ranges(first_key, length, width, BQ, BKV, EDGES)
        if DOCUMENTS:
            last = min(last, document_end(document_start + row, first_key, min(first_key + BKV, length), length))
        key_tile = load_head(key, row + first_key, head, heads, rows, BKV, TMA)
        value_tile = load_head(value, row + first_key, head, heads, rows, BKV, TMA).to(tl.bfloat16)
        factor = tl.load(rms + (heads + head).to(tl.int64) * rows + o_row, mask=m_row, other=0.0) * logit_scale
        head_sum, head_delta = log_sum + head.to(tl.int64) * rows, delta + head.to(tl.int64) * rows
        d_key, d_value = tl.zeros((BKV, 128), tl.float32), tl.zeros((BKV, 128), tl.float32)
        value_code = 1.0 / value_scale
        if EDGES < 2:
            d_key, d_value = key_gradient_blocks(
                key_tile, value_tile, d_key, d_value, factor, query, d_out, head_sum, head_delta, document_start, o_key, first,
                diagonal_end, row, rows, length, head, heads, first_key, width, slope, value_code, BQ, BKV, True, SLOPED, DOCUMENTS, TMA,
            )  # fmt: skip
            d_key, d_value = key_gradient_blocks(
                key_tile, value_tile, d_key, d_value, factor, query, d_out, head_sum, head_delta, document_start, o_key, diagonal_end,
                inner_end, row, rows, length, head, heads, first_key, width, slope, value_code, BQ, BKV, False, SLOPED, DOCUMENTS, TMA,
            )  # fmt: skip
        if EDGES > 0:
            d_key, d_value = key_gradient_blocks(
                key_tile, value_tile, d_key, d_value, factor, query, d_out, head_sum, head_delta, document_start, o_key, inner_end, last,
                row, rows, length, head, heads, first_key, width, slope, value_code, BQ, BKV, True, SLOPED, DOCUMENTS, TMA,
            )  # fmt: skip
        zero = opaque_zero(rms)
        row, head, first_key = row + zero, head + zero, first_key + zero
        o_key = first_key + tl.arange(0, BKV)
        o_row, m_row = row + o_key, row_mask(o_key, length, EVEN)
        unit = small_to_float(load_head(value, row + first_key, head, heads, rows, BKV, TMA)) * value_scale
        d_value = through_normalise(d_value, unit, rms + (3 * heads + head).to(tl.int64) * rows, o_row, m_row)
        store_gradient(
            d_value, d_projected, row_max, column_max, units, token_weight, row + first_key, o_row, m_row, 3, head, heads, TMA and EVEN,
        )  # fmt: skip
        d_key = rotate_back(d_key * (score_scale * value_scale), cosine, sine, o_key, m_row, BKV)
        store_gradient(
            d_key, d_projected, row_max, column_max, units, token_weight, row + first_key, o_row, m_row, 1, head, heads, TMA and EVEN,
        )  # fmt: skip

    @triton.jit
    def document_end(document_start, first_key, key_end, length):  # type: ignore[no-untyped-def]
        """First position whose document starts at key_end or later: no query from there on sees a key before key_end."""
        count = 0
        for block in range(first_key, length, 1024):
            position = block + tl.arange(0, 1024)
            starts = tl.load(document_start + position, mask=position < length, other=0x7FFFFFFF)
            count += tl.sum((starts < key_end).to(tl.int32), axis=0)
        return first_key + count


# -- launch ------------------------------------------------------------------------------------------------------------


def _launch_attend_backward(
    query: Tensor, key: Tensor, value: Tensor, rms: Tensor, *, d_out: Tensor, log_sum: Tensor, delta: Tensor, cosine: Tensor, sine: Tensor,
    tokens: int, width: int, slope: float, document_start: Tensor | None, store: SegmentStore,
) -> None:  # fmt: skip
    rows, heads = query.shape[0], query.shape[1] // HEAD_CHANNELS
    tma, documents, start = loads_by_descriptor(query.device), document_start is not None, rms if document_start is None else document_start
    query_scale, key_scale, value_scale = (1.0 / codes.vector_scale(x.dtype) for x in (query, key, value))
    logit_scale = LOGIT_SCALE / math.log(2.0) * query_scale * key_scale
    sizes = (rows, tokens, heads, min(width, tokens), slope, logit_scale)
    maxima = (store.row_max.view(torch.int32), store.column_max.view(torch.int32))
    fixed = {"SLOPED": slope != 0.0, "DOCUMENTS": documents, "TMA": tma}

    def operands(config: Config) -> list[Any]:
        blocks = ((query, "BQ"), (key, "BKV"), (value, "BKV"), (d_out, "BQ"))
        return [operand(x, config[block], HEAD_CHANNELS, tma) for x, block in blocks]

    config = launch(operation("query_gradient", tokens, width), capability(query.device), query.dtype)
    far = edges(tokens, width, documents, config["BQ"], config["BKV"])
    even = is_even(rows, tokens, config["BQ"])
    q, k, v, d = operands(config)
    query_gradient_kernel[(triton.cdiv(tokens, config["BQ"]) * heads * triton.cdiv(rows, tokens),)](
        q, k, v, query, rms, d, log_sum, delta, cosine, sine, start, store.units, store.token_weight,
        operand(store.d_projected, config["BQ"], HEAD_CHANNELS, tma and even), *maxima, *sizes, LOGIT_SCALE * key_scale, query_scale,
        value_scale, EDGES=far, EVEN=even, **fixed, **config,
    )  # fmt: skip
    config = launch(operation("key_gradient", tokens, width), capability(query.device), query.dtype)
    far = edges(tokens, width, documents, config["BQ"], config["BKV"])
    if not is_even(rows, tokens, config["BQ"]):
        far = max(far, 1)  # the last queries of a fragment do not fill a block
    even = is_even(rows, tokens, config["BKV"])
    q, k, v, d = operands(config)
    key_gradient_kernel[(triton.cdiv(tokens, config["BKV"]) * heads * triton.cdiv(rows, tokens),)](
        q, k, v, rms, d, log_sum, delta, cosine, sine, start, store.units, store.token_weight,
        operand(store.d_projected, config["BKV"], HEAD_CHANNELS, tma and even), *maxima, *sizes, LOGIT_SCALE * query_scale, value_scale,
        EDGES=far, EVEN=even, **fixed, **config,
    )  # fmt: skip


# -- run ---------------------------------------------------------------------------------------------------------------


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rms: Tensor,
    *,
    d_out: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    cosine: Tensor,
    sine: Tensor,
    tokens: int,
    width: int,
    slope: float,
    document_start: Tensor | None,
    units: Tensor,
    token_weight: Tensor,
    d_projected: Tensor,
    row_max: Tensor,
    column_max: Tensor,
    backend: BackendName | None = None,
) -> None:
    """Gradients of the query, key and value segments of the joined projection.

    query, key, value, tokens, width, slope, document_start: as given to `attention.attend`.
    rms: fp32 [4H, M] (query, key and value rows are read). d_out: bf16 [M, A] and delta fp32 [H, M] of `kv_product.products_backward`.
    log_sum: fp32 [H, M] of `attend`.
    cosine, sine: fp32 [T, 64]. units: fp32 [4]. token_weight: fp32 [M], > 0.
    Writes the query, key and value segments of d_projected bf16 [M, 4A]; raises row_max fp32 [M] and column_max fp32 [4A].
    """
    store = SegmentStore(units, token_weight, d_projected, row_max, column_max)
    backward = _launch_attend_backward if choose(query.device, backend).name == "triton" else ref_attend_backward
    backward(
        query, key, value, rms, d_out=d_out, log_sum=log_sum, delta=delta, cosine=cosine, sine=sine,
        tokens=tokens, width=width, slope=slope, document_start=document_start, store=store,
    )  # fmt: skip
