"""The bottom of the model: labels to the start state and its codes, and the gradient of the embedding.

    x[t] = sum over k of signs[t, k] * table[labels[t, k]]         a label below 0 adds nothing (padding rows)
    n = codes of normalise(x), per group of 128 channels           the RMS of each group is stored (normalise.py)
    grad[r] += sum over all (t, k) with labels[t, k] = r of signs[t, k] * dx[t]
The table is read in fp32: no product of it is ever made.

The gradient is the same at every run: entries (t, k) are sorted by label (stable), cut in chunks of CHUNK, and every chunk is summed in order.
A run of equal labels that lies within a chunk belongs to one program, which adds it to grad. A run that crosses chunks leaves one partial sum
per chunk, and the program of its first chunk adds them in order; so a token that is 15 % of a batch costs no more than others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.codes import encode, vector_scale
from tscale_kernels.dispatch import BackendName
from tscale_kernels.normalise import GROUP_CHANNELS, ref_normalise

CHUNK = 32
"""Sorted entries that one program sums. They are read one after the other, so a chunk takes CHUNK memory latencies."""

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_embed_normalise(labels: Tensor, signs: Tensor, table: Tensor, *, x: Tensor, n: Tensor, rms: Tensor) -> None:
    """See `embed_normalise`."""
    weights = torch.where(labels >= 0, signs.to(table.dtype).expand(labels.shape), 0.0)
    rows = labels.clamp_min(0)
    state = table[rows[:, 0]] * weights[:, :1]
    for k in range(1, labels.shape[1]):
        state = state + table[rows[:, k]] * weights[:, k : k + 1]
    x.copy_(state)
    scaled, root = ref_normalise(state, vector_scale(n.dtype))
    n.copy_(encode(scaled, n.dtype))
    rms.copy_(root.T)


def ref_embedding_gradient(dx: Tensor, labels: Tensor, signs: Tensor, *, grad: Tensor) -> None:
    """See `embedding_gradient`."""
    weights = torch.where(labels >= 0, signs.to(grad.dtype).expand(labels.shape), 0.0)
    for k in range(labels.shape[1]):
        grad.index_add_(0, labels[:, k].clamp_min(0), dx.to(grad.dtype) * weights[:, k : k + 1])


# -- run ---------------------------------------------------------------------------------------------------------------


def partial_shape(rows: int, labels: int, width: int) -> tuple[int, int, int]:
    """Shape of `embedding_gradient`'s scratch for `rows` positions with `labels` labels each."""
    return (-(-rows * labels // CHUNK), 2, width)


def embed_normalise(
    labels: Tensor, signs: Tensor, table: Tensor, *, x: Tensor, n: Tensor, rms: Tensor, backend: BackendName | None = None
) -> None:
    """Start state of every position, its codes and RMS.

    labels: int64 [M, K], below the table's rows; negative = none. signs: fp32 [M, K] or [K]. table: fp32 [rows, E]. x: fp32 or bf16 [M, E].
    n: codes [M, E]. rms: fp32 [E / 128, M]. M and E multiples of 128; all contiguous. Raises ValueError where shapes do not match.
    """
    _check(labels, signs, table, x)
    if n.shape != x.shape or rms.shape != (x.shape[1] // GROUP_CHANNELS, x.shape[0]):
        raise ValueError(f"n {tuple(n.shape)} and rms {tuple(rms.shape)} do not fit x {tuple(x.shape)}")
    ref_embed_normalise(labels, signs, table, x=x, n=n, rms=rms)


def embedding_gradient(
    dx: Tensor, labels: Tensor, signs: Tensor, *, grad: Tensor, partial: Tensor | None = None, backend: BackendName | None = None
) -> None:
    """Add the gradient of the table to `grad`.

    dx: fp32 or bf16 [M, E], gradient of the start state. labels, signs: as in `embed_normalise`. grad: fp32 [rows, E]. partial: fp32 scratch
    of `partial_shape(M, K, E)`, needed by Triton. Raises ValueError where shapes do not match.
    """
    _check(labels, signs, grad, dx)
    ref_embedding_gradient(dx, labels, signs, grad=grad)


def _check(labels: Tensor, signs: Tensor, table: Tensor, x: Tensor) -> None:
    rows, count = labels.shape
    if signs.shape not in ((rows, count), (count,)) or x.shape != (rows, table.shape[1]) or x.shape[1] % GROUP_CHANNELS:
        raise ValueError(f"labels {tuple(labels.shape)}, signs {tuple(signs.shape)}, table {tuple(table.shape)}, state {tuple(x.shape)} do not match")
