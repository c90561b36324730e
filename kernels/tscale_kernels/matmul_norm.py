"""Products whose result is normalised and encoded at once: the projections of attention, the widening half of the feed-forward step.

With lin(n, W) = n W^T / sqrt(E) and, per group of 128 output channels, root = RMS of the group (normalise.py):
    project:  query, key = codes of rotate(lin / root);  gate, value = codes of lin / root;  all four roots are stored
    expand:   hidden = codes of lin / root;  active = relu(hidden);  the root is stored
The model does not divide keys by their root (only their codes are of unit RMS): attention multiplies it back. Rotation turns the adjacent
channels 2p, 2p + 1 of a head, p = 0..63, by cosine[t, p], sine[t, p] (that is the row order of packed weights; the model's pairing is
(k, k + 32), see tscale_fed/model/rotary.py); t = row modulo tokens. Turning keeps the RMS, so it is applied to the normalised vector.

The unit of the weights and 1 / sqrt(E) cancel in the codes and only scale the roots. With int8 the sums are exact integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.codes import encode, ref_product, vector_scale
from tscale_kernels.dispatch import BackendName
from tscale_kernels.normalise import GROUP_CHANNELS, ref_normalise

SEGMENTS = 4
"""Query, key, gate, value: the row blocks of the joined projection weights."""


# -- reference ---------------------------------------------------------------------------------------------------------


def ref_project(
    n: Tensor, w: Tensor, units: Tensor, *, cosine: Tensor, sine: Tensor,
    query: Tensor, key: Tensor, gate: Tensor, value: Tensor, rms: Tensor,
) -> None:  # fmt: skip
    """See `project`."""
    factor = lin_factor(n)
    position = torch.arange(n.shape[0], device=n.device) % cosine.shape[0]
    turn = (cosine[position, None].float(), sine[position, None].float())
    sums = ref_product(n, w).unflatten(1, (SEGMENTS, -1))
    for segment, out in enumerate((query, key, gate, value)):
        scaled, root = ref_normalise(sums[:, segment], vector_scale(out.dtype))
        if segment < 2:
            scaled = ref_rotate(scaled, *turn)
        out.copy_(encode(scaled, out.dtype))
        rms.view(SEGMENTS, -1, n.shape[0])[segment].copy_(root.T * (units[segment] * factor))


def ref_rotate(values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Adjacent pairs of values [M, 128 H] turned by cosine, sine [M, 1, 64]."""
    even, odd = values.unflatten(1, (-1, GROUP_CHANNELS // 2, 2)).unbind(3)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), 3).flatten(1)


def ref_expand(n: Tensor, w: Tensor, unit: Tensor, *, hidden: Tensor, active: Tensor, rms: Tensor) -> None:
    """See `expand`."""
    scaled, root = ref_normalise(ref_product(n, w), vector_scale(hidden.dtype))
    hidden.copy_(encode(scaled, hidden.dtype))
    active.copy_(encode(scaled.relu(), active.dtype))
    rms.copy_(root.T * (unit * lin_factor(n)))


def lin_factor(n: Tensor) -> float:
    """What turns a product of vector codes n [M, E] with weight codes into lin / unit."""
    return 1.0 / (vector_scale(n.dtype) * n.shape[1] ** 0.5)


# -- run ---------------------------------------------------------------------------------------------------------------


def project(
    n: Tensor, w: Tensor, units: Tensor, *, cosine: Tensor, sine: Tensor,
    query: Tensor, key: Tensor, gate: Tensor, value: Tensor, rms: Tensor, backend: BackendName | None = None,
) -> None:  # fmt: skip
    """Write codes of the rotated query and key and of gate and value, and the RMS of all four.

    n: codes [M, E]. w: codes of the same dtype [4A, E], rows in kernel order (query, key, gate, value). units: fp32 [4].
    cosine, sine: fp32 [tokens, 64]. query, key: one code dtype [M, A]. gate, value: any code dtype [M, A]. rms: fp32 [4H, M], rows in the
    order of w. M, E, A multiples of 128; all contiguous.
    """
    _check(n, w, SEGMENTS * query.shape[1], rms)
    ref_project(n, w, units, cosine=cosine, sine=sine, query=query, key=key, gate=gate, value=value, rms=rms)


def expand(n: Tensor, w: Tensor, unit: Tensor, *, hidden: Tensor, active: Tensor, rms: Tensor, backend: BackendName | None = None) -> None:
    """Write the codes before and after relu, and the RMS.

    n: codes [M, E]. w: codes of the same dtype [F, E]. unit: fp32 [1]. hidden, active: one code dtype [M, F]. rms: fp32 [F / 128, M].
    M, E, F multiples of 128; all contiguous.
    """
    _check(n, w, hidden.shape[1], rms)
    ref_expand(n, w, unit, hidden=hidden, active=active, rms=rms)


def _check(n: Tensor, w: Tensor, columns: int, rms: Tensor) -> None:
    if n.dtype != w.dtype or w.shape != (columns, n.shape[1]) or rms.shape != (columns // GROUP_CHANNELS, n.shape[0]):
        raise ValueError(f"n {tuple(n.shape)} {n.dtype}, w {tuple(w.shape)} {w.dtype}, rms {tuple(rms.shape)} do not belong together")
