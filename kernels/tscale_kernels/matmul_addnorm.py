"""Product, residual addition and normalisation at once: how a layer's two halves end (combiner and ffn_down).

    x += lin(a, W),  lin(a, W) = a W^T / sqrt(K)
    n = codes of normalise(x), per group of 128 channels; the RMS of each group is stored (normalise.py)
x is the state, fp32 or bf16; the normalised codes are made from the fp32 sum, before it is rounded to the dtype of x.
"""

from __future__ import annotations

from torch import Tensor

from tscale_kernels.codes import encode, ref_product, vector_scale
from tscale_kernels.dispatch import BackendName
from tscale_kernels.normalise import GROUP_CHANNELS, ref_normalise


def ref_add_normalise(a: Tensor, w: Tensor, unit: Tensor, *, a_scale: float, x: Tensor, n: Tensor, rms: Tensor) -> None:
    """See `add_normalise`."""
    new = x.float() + ref_product(a, w) * (unit * lin_factor(a, a_scale))
    x.copy_(new)
    scaled, root = ref_normalise(new, vector_scale(n.dtype))
    n.copy_(encode(scaled, n.dtype))
    rms.copy_(root.T)


def lin_factor(a: Tensor, a_scale: float) -> float:
    """What turns a product of codes a [M, K] (values times a_scale) with weight codes into lin / unit."""
    return 1.0 / (a_scale * a.shape[1] ** 0.5)


def add_normalise(
    a: Tensor, w: Tensor, unit: Tensor, *, a_scale: float, x: Tensor, n: Tensor, rms: Tensor, backend: BackendName | None = None
) -> None:
    """Add lin(a, W) to x in place; write the codes and the RMS of its groups.

    a: codes [M, K] of values times a_scale. w: codes of the same dtype [E, K]. unit: fp32 [1]. x: fp32 or bf16 [M, E]. n: codes [M, E].
    rms: fp32 [E / 128, M]. M, K, E multiples of 128; all contiguous.
    """
    rows, columns = x.shape
    if a.dtype != w.dtype or w.shape != (columns, a.shape[1]) or a.shape[0] != rows or rms.shape != (columns // GROUP_CHANNELS, rows):
        raise ValueError(f"a {tuple(a.shape)} {a.dtype}, w {tuple(w.shape)} {w.dtype}, x {tuple(x.shape)}, rms {tuple(rms.shape)} differ")
    ref_add_normalise(a, w, unit, a_scale=a_scale, x=x, n=n, rms=rms)
