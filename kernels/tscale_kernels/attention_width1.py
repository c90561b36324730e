"""Attention of width 1: every token sees the previous one alone, so there is no score matrix.

    logit(t) = 0.5 / (sqrt(128) ln 2) * query_t . key_(t-1) - slope
    out(t) = value_(t-1) / (1 + 2^-logit(t))     0 for the first token of a fragment or document; rounded to bf16
    products(t)[h, i, z] = gate(t)[h, 32 i + z % 32] * out(t)[h, z]
The same numbers as `attention.attend` with width 1. The backward pass makes the weights again: nothing but `out` and `products`
is stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tscale_kernels import codes
from tscale_kernels.attention import LOGIT_SCALE, product_step, ref_products
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.head_gradient import HEAD_CHANNELS, KEY, heads_of, segment_rms, working_dtype
from tscale_kernels.launch_table import launch

# -- reference ---------------------------------------------------------------------------------------------------------


def previous(x: Tensor) -> Tensor:
    """[M, ...] -> row t holds row t - 1; row 0 is zero."""
    return torch.cat((torch.zeros_like(x[:1]), x[:-1]))


def sees_previous(rows: int, tokens: int, document_start: Tensor | None, device: torch.device) -> Tensor:
    """bool [M]: the row has a previous token of its fragment and document."""
    position = torch.arange(rows, device=device) % tokens
    return position > (0 if document_start is None else document_start)


def ref_weight(query: Tensor, key_before: Tensor, sees: Tensor, slope: float) -> Tensor:
    """[M, H]: weight of the previous value. query, key_before [M, H, 128]: unit queries, true keys of the row before."""
    logit = (query * key_before).sum(2) * LOGIT_SCALE - slope * math.log(2.0)
    return torch.sigmoid(logit) * sees[:, None]


def ref_attend_width1(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rms: Tensor,
    gate: Tensor,
    *,
    tokens: int,
    slope: float,
    document_start: Tensor | None,
    out: Tensor,
    products: Tensor,
    product_scale: float | None = None,
) -> None:
    """See `attend_width1`."""
    dtype = working_dtype(query, rms)
    true_key = heads_of(key, dtype) * segment_rms(rms, KEY)[:, :, None].to(dtype)
    sees = sees_previous(query.shape[0], tokens, document_start, query.device)
    weight = ref_weight(heads_of(query, dtype), previous(true_key), sees, slope)
    out.copy_((weight[:, :, None] * previous(heads_of(value, dtype))).flatten(1))
    ref_products(gate, out, products, product_scale)


# -- Triton ------------------------------------------------------------------------------------------------------------
# One program handles BR rows of one head; BR divides 128, so rows need no masks.

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.attention import store_products
    from tscale_kernels.codes import small_to_float
    from tscale_kernels.tiles import TRITON_DTYPES, capability

    @triton.jit
    def load_codes(x, o_row, m_row, head, heads):  # type: ignore[no-untyped-def]
        """Rows o_row [R] of one head as fp32 [R, 128]; 0 where not m_row."""
        p_tile = x + o_row[:, None].to(tl.int64) * (heads * 128) + head * 128 + tl.arange(0, 128)[None, :]
        return small_to_float(tl.load(p_tile, mask=m_row[:, None], other=0.0))

    @triton.jit
    def previous_mask(o_row, tokens, document_start, m_row, DOCUMENTS: tl.constexpr):  # type: ignore[no-untyped-def]
        """`sees_previous` of rows o_row, and m_row."""
        start = tl.zeros(o_row.shape, tl.int32)
        if DOCUMENTS:
            start = tl.load(document_start + o_row, mask=m_row, other=0)
        return (o_row % tokens > start) & m_row

    @triton.jit
    def previous_weight(query_tile, key_tile, head_rms, o_row, m_sees, slope, logit_scale):  # type: ignore[no-untyped-def]
        """`ref_weight` [R]: query_tile of rows o_row, key_tile of the rows before them."""
        root = tl.load(head_rms + o_row - 1, mask=m_sees, other=0.0)
        logit = tl.sum(query_tile * key_tile, axis=1) * (root * logit_scale) - slope
        return tl.where(m_sees, 1.0 / (1.0 + tl.exp2(-logit)), 0.0)

    @triton.jit
    def attend_width1_kernel(  # type: ignore[no-untyped-def]
        query, key, value, key_rms, gate, document_start, out, products, rows, tokens, heads, slope, logit_scale, value_scale,
        BR: tl.constexpr, DOCUMENTS: tl.constexpr, CODE: tl.constexpr, STEP: tl.constexpr,
    ):  # fmt: skip
        """See `attend_width1`."""
        head = tl.program_id(0) % heads
        o_row = tl.program_id(0) // heads * BR + tl.arange(0, BR)
        m_row = tl.full((BR,), True, tl.int1)
        m_sees = previous_mask(o_row, tokens, document_start, m_row, DOCUMENTS)
        query_tile = load_codes(query, o_row, m_row, head, heads)
        key_tile = load_codes(key, o_row - 1, m_sees, head, heads)
        weight = previous_weight(query_tile, key_tile, key_rms + head.to(tl.int64) * rows, o_row, m_sees, slope, logit_scale)
        out_tile = (load_codes(value, o_row - 1, m_sees, head, heads) * (weight * value_scale)[:, None]).to(tl.bfloat16)
        p_out = out + o_row[:, None].to(tl.int64) * (heads * 128) + head * 128 + tl.arange(0, 128)[None, :]
        tl.store(p_out, out_tile)
        store_products(out_tile.to(tl.float32), gate, products, o_row, m_row, head, heads, CODE, STEP)


def logit_scale_of_codes(query: Tensor, key: Tensor) -> float:
    """Base-2 logit of query code . key code = 1 and an rms of 1."""
    return LOGIT_SCALE / math.log(2.0) / (codes.vector_scale(query.dtype) * codes.vector_scale(key.dtype))


def _launch_attend_width1(
    query: Tensor, key: Tensor, value: Tensor, rms: Tensor, gate: Tensor, *, tokens: int, slope: float, document_start: Tensor | None,
    out: Tensor, products: Tensor, product_scale: float | None,
) -> None:  # fmt: skip
    rows, heads = query.shape[0], query.shape[1] // HEAD_CHANNELS
    config = launch("attend_width1", capability(query.device))
    documents = document_start is not None
    attend_width1_kernel[(rows // config["BR"] * heads,)](
        query, key, value, rms[KEY * heads :], gate, document_start if documents else rms, out, products, rows, tokens, heads, slope,
        logit_scale_of_codes(query, key), 1.0 / codes.vector_scale(value.dtype),
        DOCUMENTS=documents, CODE=TRITON_DTYPES[products.dtype], STEP=product_step(gate.dtype, product_scale), **config,
    )  # fmt: skip


# -- run ---------------------------------------------------------------------------------------------------------------


def attend_width1(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rms: Tensor,
    gate: Tensor,
    *,
    tokens: int,
    slope: float,
    document_start: Tensor | None,
    out: Tensor,
    products: Tensor,
    product_scale: float | None = None,
    backend: BackendName | None = None,
) -> None:
    """`attention.attend` for width 1. Shapes and dtypes as there; no log_sum."""
    attend_here = _launch_attend_width1 if choose(query.device, backend).name == "triton" else ref_attend_width1
    attend_here(
        query, key, value, rms, gate, tokens=tokens, slope=slope, document_start=document_start, out=out, products=products,
        product_scale=product_scale,
    )  # fmt: skip
