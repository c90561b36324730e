"""Backward of attention of width 1: one pass, no score matrix, nothing needed of the forward pass but its inputs.

With weight(t) of attention_width1.py, and d_weight(t) = d_out_t . value_(t-1):
    dS(t) = weight(t) * (1 - weight(t)) * d_weight(t)
    d_query_t = c dS(t) key_(t-1)      d_key_(t-1) = c dS(t) query_t      d_value_(t-1) = weight(t) d_out_t      c = 0.5 / sqrt(128)
Then head_gradient.py: normalise (query, value), rotation (query, key), statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.attention import LOGIT_SCALE
from tscale_kernels.attention_backward import ref_store_attention
from tscale_kernels.attention_width1 import previous, ref_weight, sees_previous
from tscale_kernels.dispatch import BackendName
from tscale_kernels.head_gradient import KEY, SegmentStore, heads_of, segment_rms, working_dtype

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
    ref_attend_backward_width1(
        query, key, value, rms, d_out=d_out, cosine=cosine, sine=sine, tokens=tokens, slope=slope,
        document_start=document_start, store=store,
    )  # fmt: skip
