"""Data gradients: g [M, N] times a weight [N, K], and what the layer does with the product, in its epilogue.

    d[t, k] = row_unit[t] * unit / sqrt(K) * sum_n g[t, n] * w_t[k, n]                       lin(x, W) = x W^T / sqrt(K), backwards
    to_input           out = d
    through_relu_norm  out = normalise'(d where hidden >= 0 else 0)     gradient of the up projection's output
    through_norm_add   dx += normalise'(d)                              gradient of the residual stream
    normalise'(d) = (d - y * mean(y d)) / rms   over groups of 128 channels, y = code / vector_scale the stored normalised vector
The last two also find the maxima that the next quantiser needs (`quantize.py`): row_max[t] over channels of |result| and column_max[k] over
tokens of |result| * token_weight, of the result as stored, by atomic maxima, which no order changes. A joined projection has its units in
the row codes already, and takes unit = 1. The sum is exact for int8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.codes import ref_product, vector_scale
from tscale_kernels.dispatch import BackendName, choose

_GROUP_CHANNELS = 128

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_to_input(g: Tensor, row_unit: Tensor, w_t: Tensor, unit: Tensor, *, out: Tensor) -> None:
    """See `to_input`."""
    out.copy_(_ref_gradient(g, row_unit, w_t, unit))


def ref_through_relu_norm(
    g: Tensor, row_unit: Tensor, w_t: Tensor, unit: Tensor,
    *, hidden: Tensor, rms: Tensor, token_weight: Tensor, out: Tensor, row_max: Tensor, column_max: Tensor,
) -> None:  # fmt: skip
    """See `through_relu_norm`."""
    d = _ref_gradient(g, row_unit, w_t, unit)
    out.copy_(ref_through_norm(torch.where(hidden.float() >= 0, d, 0.0), hidden, rms))
    _ref_maxima(out, token_weight, row_max, column_max)


def ref_through_norm_add(
    g: Tensor, row_unit: Tensor, w_t: Tensor, unit: Tensor,
    *, n: Tensor, rms: Tensor, token_weight: Tensor, dx: Tensor, row_max: Tensor, column_max: Tensor,
) -> None:  # fmt: skip
    """See `through_norm_add`."""
    d = ref_through_norm(_ref_gradient(g, row_unit, w_t, unit), n, rms)
    dx.copy_(dx.float() + d)
    _ref_maxima(dx, token_weight, row_max, column_max)


def _ref_gradient(g: Tensor, row_unit: Tensor, w_t: Tensor, unit: Tensor) -> Tensor:
    return ref_product(g, w_t) * (row_unit * (unit * w_t.shape[0] ** -0.5))[:, None]


def ref_through_norm(d: Tensor, codes: Tensor, rms: Tensor) -> Tensor:
    """normalise'(d). d: fp32 [M, K]; codes [M, K] of the normalised vector; rms: fp32 [K / 128, M]. A group of rms 0 passes no gradient."""
    y = (codes.float() * (1.0 / vector_scale(codes.dtype))).unflatten(1, (-1, _GROUP_CHANNELS))
    groups = d.unflatten(1, (-1, _GROUP_CHANNELS))
    along = (y * groups).sum(-1, keepdim=True) * (1.0 / _GROUP_CHANNELS)
    inverse = torch.where(rms == 0, 0.0, 1.0 / rms).T[:, :, None]
    return ((groups - y * along) * inverse).flatten(1)


def _ref_maxima(stored: Tensor, token_weight: Tensor, row_max: Tensor, column_max: Tensor) -> None:
    size = stored.float().abs()
    row_max.copy_(torch.maximum(row_max, size.amax(1)))
    column_max.copy_(torch.maximum(column_max, (size * token_weight[:, None]).amax(0)))


# -- run ---------------------------------------------------------------------------------------------------------------


def to_input(g: Tensor, row_unit: Tensor, w_t: Tensor, unit: Tensor, *, out: Tensor, backend: BackendName | None = None) -> None:
    """out = d. g: codes [M, N]; row_unit: fp32 [M]; w_t: codes [K, N] of the same dtype; unit: fp32 [1]; out: bf16 [M, K]."""
    choose(g.device, backend)
    ref_to_input(g, row_unit, w_t, unit, out=out)


def through_relu_norm(
    g: Tensor,
    row_unit: Tensor,
    w_t: Tensor,
    unit: Tensor,
    *,
    hidden: Tensor,
    rms: Tensor,
    token_weight: Tensor,
    out: Tensor,
    row_max: Tensor,
    column_max: Tensor,
    backend: BackendName | None = None,
) -> None:
    """out = normalise'(ReLU'(d)). Operands as in `to_input`; hidden: codes [M, K] before the ReLU (0 passes); rms: fp32 [K / 128, M].

    Writes out bf16 [M, K]; raises row_max fp32 [M] and column_max fp32 [K] (zeroed by the caller) to the maxima of out.
    token_weight: fp32 [M].
    """
    choose(g.device, backend)
    ref_through_relu_norm(
        g, row_unit, w_t, unit, hidden=hidden, rms=rms, token_weight=token_weight, out=out, row_max=row_max, column_max=column_max
    )


def through_norm_add(
    g: Tensor,
    row_unit: Tensor,
    w_t: Tensor,
    unit: Tensor,
    *,
    n: Tensor,
    rms: Tensor,
    token_weight: Tensor,
    dx: Tensor,
    row_max: Tensor,
    column_max: Tensor,
    backend: BackendName | None = None,
) -> None:
    """dx += normalise'(d), in place. Operands as in `to_input`; n: codes [M, K] of the normalised stream; rms: fp32 [K / 128, M].

    dx: fp32 or bf16 [M, K]. Raises row_max fp32 [M] and column_max fp32 [K] (zeroed by the caller) to the maxima of the new dx.
    """
    choose(g.device, backend)
    ref_through_norm_add(g, row_unit, w_t, unit, n=n, rms=rms, token_weight=token_weight, dx=dx, row_max=row_max, column_max=column_max)
