"""Attention forward: enters codes of queries, keys, values and gates, leaves the attended values and the combiner's input.

Rule (TScale; tscale_fed/model/attention.py), in base 2; t sees s with max(start of its document, t - width) <= s <= t - 1:
    logit(t, s) = 0.5 / (sqrt(128) ln 2) * query_t . key_s - slope * (t - s)          query of unit RMS, key = code / scale * its rms
    log_sum(t) = log2(1 + sum_s 2^logit(t, s))                                        the 1 is the sink: a zero value with logit 0
    out(t) = sum_s 2^(logit(t, s) - log_sum(t)) * value_s                             rounded to bf16
    products(t)[h, i, z] = gate(t)[h, 32 i + z % 32] * out(t)[h, z], i = 0..3         codes; order of combiner.blocked_columns
A token that sees nothing gets 0 and log_sum 0. Products are made of the rounded `out`, so whoever keeps gate and out can make them again.

Fragments are runs of T rows; the last may be shorter (rows that only fill up a multiple of 128: their codes are 0, so are their results).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tscale_kernels import codes
from tscale_kernels.dispatch import BackendName
from tscale_kernels.head_gradient import HEAD_CHANNELS, KEY, heads_of, segment_rms, working_dtype

LOGIT_SCALE = 0.5 / math.sqrt(HEAD_CHANNELS)
"""Natural logit of query . key = 1."""
PRODUCTS_PER_CHANNEL = 4
_GATE_BLOCK = HEAD_CHANNELS // PRODUCTS_PER_CHANNEL

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


def ref_products(gate: Tensor, out: Tensor, products: Tensor) -> None:
    """products [M, 4A] = codes of the blocked outer product of gate codes [M, A] and out [M, A]."""
    dtype = working_dtype(out, products)
    blocks = gate.unflatten(1, (-1, PRODUCTS_PER_CHANNEL, 1, _GATE_BLOCK)).to(dtype)
    pairs = blocks * out.unflatten(1, (-1, 1, PRODUCTS_PER_CHANNEL, _GATE_BLOCK)).to(dtype)
    scale = codes.vector_scale(products.dtype) / codes.vector_scale(gate.dtype)
    scaled = pairs.flatten(1) * scale if scale != 1.0 else pairs.flatten(1)
    products.copy_(codes.encode(scaled, products.dtype) if products.dtype in codes.CODE_DTYPES else scaled)


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
    ref_products(gate, out, products)


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
    backend: BackendName | None = None,
) -> None:
    """Attention of one layer, and the combiner's input.

    query, key: [M, A] int8, e4m3 or bf16 codes of unit-RMS vectors, rotated. value: [M, A] bf16 or e4m3. gate: [M, A] codes.
    rms: fp32 [4H, M], of which the key rows H..2H-1 are read. tokens: T, length of a fragment. width: tokens seen, at least 1.
    slope: base-2 units per token. document_start: int32 [M], position in the fragment where the row's document starts, or None.
    Writes out bf16 [M, A], log_sum fp32 [H, M], products [M, 4A] codes.
    """
    ref_attend(
        query, key, value, rms, gate, tokens=tokens, width=width, slope=slope, document_start=document_start,
        out=out, log_sum=log_sum, products=products,
    )  # fmt: skip
