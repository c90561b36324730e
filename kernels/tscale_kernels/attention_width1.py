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

from tscale_kernels.attention import LOGIT_SCALE, ref_products
from tscale_kernels.dispatch import BackendName
from tscale_kernels.head_gradient import KEY, heads_of, segment_rms, working_dtype

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
) -> None:
    """See `attend_width1`."""
    dtype = working_dtype(query, rms)
    true_key = heads_of(key, dtype) * segment_rms(rms, KEY)[:, :, None].to(dtype)
    sees = sees_previous(query.shape[0], tokens, document_start, query.device)
    weight = ref_weight(heads_of(query, dtype), previous(true_key), sees, slope)
    out.copy_((weight[:, :, None] * previous(heads_of(value, dtype))).flatten(1))
    ref_products(gate, out, products)


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
    backend: BackendName | None = None,
) -> None:
    """`attention.attend` for width 1. Shapes and dtypes as there; no log_sum."""
    ref_attend_width1(query, key, value, rms, gate, tokens=tokens, slope=slope, document_start=document_start, out=out, products=products)
