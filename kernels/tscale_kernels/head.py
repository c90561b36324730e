"""The top of the model: final layer, cross-entropy and their gradients, without ever storing the logits.

    logit[t, c] = (n[t] . w[c]) * unit / (vector_scale * sqrt(E)) + bias[c]         natural units; bias -1e30 on padding columns
    total[t] = log sum over c of exp logit[t, c];  losses[t] = total[t] - logit[t, target[t]], 0 where target[t] is -1
    d_logit[t, c] = exp(logit[t, c] - total[t]) - (c is target[t]), 0 where target[t] is -1
    d_n[t] = sum over c of d_logit[t, c] * w[c] * unit / sqrt(E);  grad[c] += sum over t of d_logit[t, c] * n[t] / (vector_scale * sqrt(E))
The product of codes is made twice. Pass 1 keeps of every tile its row maximum and sum of exponentials; these are joined in a fixed order.
Pass 2 takes a chunk of rows, makes its logits again (the same bits) and writes d_logit, times `error_scale`, in bf16; from these come both
gradients as bf16 products with fp32 sums. The codes are exact in bf16, and with error_scale = unit / sqrt(E) the first product is d_n itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from tscale_kernels.codes import ref_product, vector_scale
from tscale_kernels.dispatch import BackendName

NO_TARGET = -1
PADDING_BIAS = -1e30
"""Bias of columns beyond the vocabulary: their exponential is exactly 0."""
CHUNK_BYTES = 1 << 29
"""Most bytes of d_logit in the default chunk: 5 000 rows of a vocabulary of 50 000, whose products fill a card."""
VOCAB_TILE = 128
"""Columns whose statistics pass 1 keeps together: the size of the scratch follows from it."""

# -- reference ---------------------------------------------------------------------------------------------------------


def _ref_logits(n: Tensor, w: Tensor, unit: Tensor, bias: Tensor) -> Tensor:
    return ref_product(n, w) * (unit / (vector_scale(n.dtype) * sqrt(n.shape[1]))) + bias


def _ref_add_losses(logits: Tensor, target: Tensor, losses: Tensor) -> Tensor:
    """Writes the losses of some rows, returns the log of their totals [rows, 1]."""
    total = torch.logsumexp(logits, 1, keepdim=True)
    chosen = logits.gather(1, target.clamp_min(0)[:, None])
    losses.copy_(torch.where(target >= 0, (total - chosen)[:, 0], 0.0))
    return total


def _ref_chunks(n: Tensor, w: Tensor) -> list[slice]:
    rows = chunk_rows(n.shape[0], w.shape[0])
    return [slice(start, start + rows) for start in range(0, n.shape[0], rows)]


def ref_loss(n: Tensor, w: Tensor, unit: Tensor, bias: Tensor, target: Tensor, *, losses: Tensor, loss_sum: Tensor) -> None:
    """See `loss`."""
    for part in _ref_chunks(n, w):
        _ref_add_losses(_ref_logits(n[part], w, unit, bias), target[part], losses[part])
    loss_sum += losses.sum(dtype=torch.float64)


def ref_loss_and_gradient(
    n: Tensor, w: Tensor, unit: Tensor, bias: Tensor, target: Tensor, *, losses: Tensor, loss_sum: Tensor, d_n: Tensor, grad: Tensor
) -> None:
    """See `loss_and_gradient`."""
    scale = _error_scale(unit, n.shape[1])
    for part in _ref_chunks(n, w):
        logits = _ref_logits(n[part], w, unit, bias)
        total = _ref_add_losses(logits, target[part], losses[part])
        wanted = target[part, None] == torch.arange(w.shape[0], device=w.device)
        error = torch.where(target[part, None] >= 0, torch.exp(logits - total) - wanted.float(), 0.0)
        error = (error * scale).to(torch.bfloat16).float()
        d_n[part] = (error @ w.float()).to(d_n.dtype)
        grad += (error[:, : grad.shape[0]].T @ n[part].float()) / (scale * (vector_scale(n.dtype) * sqrt(n.shape[1])))
    loss_sum += losses.sum(dtype=torch.float64)


def _error_scale(unit: Tensor, width: int) -> Tensor:
    """fp32 [1] that d_logit is multiplied with before it is stored; a final layer of zeros has unit 0, then any number does."""
    return torch.where(unit > 0, unit, 1.0) / sqrt(width)


# -- scratch -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadScratch:
    """Static buffers of the head: statistics [2, VP / 128, M] fp32, total and chosen logit [M] fp32; for gradients also error [chunk, VP]
    bf16, the codes as bf16 (w_half [VP, E], n_half [M, E]) and partial gradients [splits, VP, E] fp32 for small vocabularies."""

    statistics: Tensor
    total: Tensor
    chosen: Tensor
    error: Tensor
    w_half: Tensor
    n_half: Tensor
    partial: Tensor

    @staticmethod
    def allocate(rows: int, padded_vocab: int, width: int, device: torch.device | str, *, gradient: bool = True, chunk: int = 0) -> HeadScratch:
        """Buffers for `rows` (M); gradient=False for `loss` alone; chunk rows at once, 0 = `chunk_rows`."""
        shapes = scratch_shapes(rows, padded_vocab, width, gradient=gradient, chunk=chunk)
        return HeadScratch(**{name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()})


def scratch_shapes(
    rows: int, padded_vocab: int, width: int, *, gradient: bool = True, chunk: int = 0
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of every buffer of `HeadScratch`."""
    kept = 1 if gradient else 0
    half, full = torch.bfloat16, torch.float32
    return {
        "statistics": ((2, padded_vocab // VOCAB_TILE, rows), full),
        "total": ((rows,), full),
        "chosen": ((rows,), full),
        "error": ((kept * (chunk or chunk_rows(rows, padded_vocab)), padded_vocab), half),
        "w_half": ((kept * padded_vocab, width), half),
        "n_half": ((kept * rows, width), half),
        "partial": ((kept * gradient_splits(rows, padded_vocab, width), padded_vocab, width), full),
    }


def scratch_bytes(rows: int, padded_vocab: int, width: int, *, gradient: bool = True, chunk: int = 0) -> int:
    """Bytes of `HeadScratch`."""
    return sum(prod(s) * d.itemsize for s, d in scratch_shapes(rows, padded_vocab, width, gradient=gradient, chunk=chunk).values())


def chunk_rows(rows: int, padded_vocab: int) -> int:
    """Rows of the default chunk, a multiple of 128: equal chunks of at most CHUNK_BYTES."""
    most = max(1, CHUNK_BYTES // (2 * 128 * padded_vocab))
    blocks = -(-rows // 128)
    chunks = -(-blocks // most)
    return -(-blocks // chunks) * 128


def gradient_splits(rows: int, padded_vocab: int, width: int) -> int:
    """In how many parts the rows of a chunk are summed apart: 0 = in one, added to the gradient at once."""
    tiles = (padded_vocab // 128) * (width // 128)
    blocks = chunk_rows(rows, padded_vocab) // 128
    return 0 if tiles >= 128 else min(-(-264 // tiles), blocks)


# -- run ---------------------------------------------------------------------------------------------------------------


def loss(
    n: Tensor, w: Tensor, unit: Tensor, bias: Tensor, target: Tensor, *, losses: Tensor, loss_sum: Tensor, scratch: HeadScratch | None = None,
    backend: BackendName | None = None,
) -> None:  # fmt: skip
    """Cross-entropy of every position, nothing else (evaluation). As `loss_and_gradient`."""
    _check(n, w, bias, target)
    ref_loss(n, w, unit, bias, target, losses=losses, loss_sum=loss_sum)


def loss_and_gradient(
    n: Tensor, w: Tensor, unit: Tensor, bias: Tensor, target: Tensor, *, losses: Tensor, loss_sum: Tensor, d_n: Tensor, grad: Tensor,
    scratch: HeadScratch | None = None, backend: BackendName | None = None,
) -> None:  # fmt: skip
    """Cross-entropy of every position, and the gradients of its sum.

    n: codes [M, E]. w: codes of the same dtype [VP, E], zero beyond the vocabulary. unit: fp32 [1]. bias: fp32 [VP], natural units, PADDING_BIAS
    beyond the vocabulary. target: int64 [M], -1 = none. losses: fp32 [M], written. loss_sum: fp64 [1], added to. d_n: bf16 [M, E], written:
    gradient of the normalised state (value, not code). grad: fp32 [V, E], V <= VP, added to. scratch: needed by Triton.
    M, E, VP multiples of 128; all contiguous. Raises ValueError where shapes do not match.
    """
    _check(n, w, bias, target)
    if d_n.shape != n.shape or grad.shape[0] > w.shape[0] or grad.shape[1] != w.shape[1]:
        raise ValueError(f"d_n {tuple(d_n.shape)} and grad {tuple(grad.shape)} do not fit n {tuple(n.shape)} and w {tuple(w.shape)}")
    ref_loss_and_gradient(n, w, unit, bias, target, losses=losses, loss_sum=loss_sum, d_n=d_n, grad=grad)


def _check(n: Tensor, w: Tensor, bias: Tensor, target: Tensor) -> None:
    if n.dtype != w.dtype or n.shape[1] != w.shape[1] or bias.shape != w.shape[:1] or target.shape != n.shape[:1]:
        raise ValueError(f"n {tuple(n.shape)} {n.dtype}, w {tuple(w.shape)} {w.dtype}, bias {tuple(bias.shape)}, target {tuple(target.shape)} do not match")
    if n.shape[0] % 128 or n.shape[1] % 128 or w.shape[0] % 128:
        raise ValueError(f"n {tuple(n.shape)} and w {tuple(w.shape)}: all sizes must be multiples of 128")
