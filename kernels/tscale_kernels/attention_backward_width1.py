"""Backward of attention of width 1: one pass, no score matrix, nothing needed of the forward pass but its inputs.

With weight(t) of attention_width1.py, and d_weight(t) = d_out_t . value_(t-1):
    dS(t) = weight(t) * (1 - weight(t)) * d_weight(t)
    d_query_t = c dS(t) key_(t-1)      d_key_(t-1) = c dS(t) query_t      d_value_(t-1) = weight(t) d_out_t      c = 0.5 / sqrt(128)
Then head_gradient.py: normalise (query, value), rotation (query, key), statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels import codes
from tscale_kernels.attention import LOGIT_SCALE
from tscale_kernels.attention_backward import ref_store_attention
from tscale_kernels.attention_width1 import logit_scale_of_codes, previous, ref_weight, sees_previous
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.head_gradient import HEAD_CHANNELS, KEY, SegmentStore, heads_of, segment_rms, working_dtype
from tscale_kernels.launch_table import launch

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_attend_backward_width1(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rms: Tensor,
    *,
    d_out: Tensor,
    cosine: Tensor,
    sine: Tensor,
    tokens: int,
    slope: float,
    document_start: Tensor | None,
    store: SegmentStore,
) -> None:
    """See `attend_backward_width1`."""
    dtype = working_dtype(query, rms)
    unit_query, unit_value = heads_of(query, dtype), heads_of(value, dtype)
    true_key = heads_of(key, dtype) * segment_rms(rms, KEY)[:, :, None].to(dtype)
    gradient = d_out.to(dtype).view_as(unit_query)
    key_before, value_before = previous(true_key), previous(unit_value)
    weight = ref_weight(unit_query, key_before, sees_previous(query.shape[0], tokens, document_start, query.device), slope)[:, :, None]
    d_score = weight * (1 - weight) * (gradient * value_before).sum(2, keepdim=True) * LOGIT_SCALE
    d_key, d_value = _next(d_score * unit_query), _next(weight * gradient)
    ref_store_attention(d_score * key_before, d_key, d_value, unit_query, unit_value, rms, cosine, sine, store)


def _next(x: Tensor) -> Tensor:
    """[M, ...] -> row t holds row t + 1; the last row is zero."""
    return torch.cat((x[1:], torch.zeros_like(x[:1])))


# -- Triton ------------------------------------------------------------------------------------------------------------
# One program handles BR rows of one head. Queries look one row back, keys and values are seen from one row ahead, so every weight is made
# twice; the other rows come from the cache.

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.attention_width1 import load_codes, previous_mask, previous_weight
    from tscale_kernels.head_gradient import rotate_back, store_gradient, through_normalise
    from tscale_kernels.tiles import capability

    @triton.jit
    def attend_backward_width1_kernel(  # type: ignore[no-untyped-def]
        query, key, value, rms, d_out, cosine, sine, document_start, units, token_weight, d_projected, row_max, column_max,
        rows, tokens, heads, slope, logit_scale, score_scale, query_scale, key_scale, value_scale,
        BR: tl.constexpr, DOCUMENTS: tl.constexpr,
    ):  # fmt: skip
        """See `attend_backward_width1`. score_scale: c."""
        head = tl.program_id(0) % heads
        first_row = tl.program_id(0) // heads * BR
        o_row = first_row + tl.arange(0, BR)
        m_row = tl.full((BR,), True, tl.int1)
        position = o_row % tokens
        key_rms = rms + (heads + head).to(tl.int64) * rows

        m_sees = previous_mask(o_row, tokens, document_start, m_row, DOCUMENTS)
        query_tile = load_codes(query, o_row, m_row, head, heads)
        key_before = load_codes(key, o_row - 1, m_sees, head, heads)
        weight = previous_weight(query_tile, key_before, key_rms, o_row, m_sees, slope, logit_scale)
        value_before = load_codes(value, o_row - 1, m_sees, head, heads)
        d_weight = tl.sum(load_codes(d_out, o_row, m_row, head, heads) * value_before, axis=1) * value_scale
        root = tl.load(key_rms + o_row - 1, mask=m_sees, other=0.0)
        d_score = weight * (1.0 - weight) * d_weight * (root * key_scale * score_scale)
        d_query = through_normalise(d_score[:, None] * key_before, query_tile * query_scale, rms + head.to(tl.int64) * rows, o_row, m_row)
        store_gradient(
            rotate_back(d_query, cosine, sine, position, m_row, BR), d_projected, row_max, column_max, units, token_weight,
            first_row, o_row, m_row, 0, head, heads, False,
        )  # fmt: skip

        m_after = previous_mask(o_row + 1, tokens, document_start, o_row + 1 < rows, DOCUMENTS)
        query_after = load_codes(query, o_row + 1, m_after, head, heads)
        weight = previous_weight(query_after, load_codes(key, o_row, m_row, head, heads), key_rms, o_row + 1, m_after, slope, logit_scale)
        gradient_after = load_codes(d_out, o_row + 1, m_after, head, heads)
        value_tile = load_codes(value, o_row, m_row, head, heads) * value_scale
        d_score = weight * (1.0 - weight) * tl.sum(gradient_after * value_tile, axis=1) * (query_scale * score_scale)
        store_gradient(
            rotate_back(d_score[:, None] * query_after, cosine, sine, position, m_row, BR), d_projected, row_max, column_max,
            units, token_weight, first_row, o_row, m_row, 1, head, heads, False,
        )  # fmt: skip
        d_value = through_normalise(
            weight[:, None] * gradient_after, value_tile, rms + (3 * heads + head).to(tl.int64) * rows, o_row, m_row
        )
        store_gradient(
            d_value, d_projected, row_max, column_max, units, token_weight, first_row, o_row, m_row, 3, head, heads, False,
        )  # fmt: skip


def _launch_attend_backward_width1(
    query: Tensor, key: Tensor, value: Tensor, rms: Tensor, *, d_out: Tensor, cosine: Tensor, sine: Tensor, tokens: int, slope: float,
    document_start: Tensor | None, store: SegmentStore,
) -> None:  # fmt: skip
    rows, heads = query.shape[0], query.shape[1] // HEAD_CHANNELS
    config = launch("attend_backward_width1", capability(query.device))
    attend_backward_width1_kernel[(rows // config["BR"] * heads,)](
        query, key, value, rms, d_out, cosine, sine, rms if document_start is None else document_start, store.units, store.token_weight,
        store.d_projected, store.row_max.view(torch.int32), store.column_max.view(torch.int32), rows, tokens, heads, slope,
        logit_scale_of_codes(query, key), LOGIT_SCALE, *(1.0 / codes.vector_scale(x.dtype) for x in (query, key, value)),
        DOCUMENTS=document_start is not None, **config,
    )  # fmt: skip


# -- run ---------------------------------------------------------------------------------------------------------------


def attend_backward_width1(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rms: Tensor,
    *,
    d_out: Tensor,
    cosine: Tensor,
    sine: Tensor,
    tokens: int,
    slope: float,
    document_start: Tensor | None,
    units: Tensor,
    token_weight: Tensor,
    d_projected: Tensor,
    row_max: Tensor,
    column_max: Tensor,
    backend: BackendName | None = None,
) -> None:
    """`attention_backward.attend_backward` for width 1. Shapes and dtypes as there; neither log_sum nor delta is needed."""
    store = SegmentStore(units, token_weight, d_projected, row_max, column_max)
    backward = _launch_attend_backward_width1 if choose(query.device, backend).name == "triton" else ref_attend_backward_width1
    backward(
        query, key, value, rms, d_out=d_out, cosine=cosine, sine=sine, tokens=tokens, slope=slope,
        document_start=document_start, store=store,
    )  # fmt: skip
