"""Attention backward: enters the gradient of the attention result, leaves the gradients of the query, key and value projections.

With weight(t, s) = 2^(logit(t, s) - log_sum(t)) made again from the same codes (attention.py says what a logit is and who sees whom):
    dS(t, s) = weight(t, s) * (d_out_t . value_s - delta_t)        delta_t = out_t . d_out_t; the sink's value is zero: no term
    d_query_t = c sum_s dS(t, s) key_s,   d_key_s = c sum_t dS(t, s) query_t,   c = 0.5 / sqrt(128)
    d_value_s = sum_t weight(t, s) d_out_t
Then head_gradient.py: normalise (query, value), rotation (query, key), statistics. Keys are true keys (code / scale * rms) in
the products, and their gradient is that of the true key: the projection's output, turned back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.attention import LOGIT_SCALE, by_fragment, fragments_per_chunk, ref_logits
from tscale_kernels.dispatch import BackendName
from tscale_kernels.head_gradient import (
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
)  # fmt: skip

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
    ref_attend_backward(
        query, key, value, rms, d_out=d_out, log_sum=log_sum, delta=delta, cosine=cosine, sine=sine,
        tokens=tokens, width=width, slope=slope, document_start=document_start, store=store,
    )  # fmt: skip
