"""The optimizer step of one matrix in host memory: bf16 gradient in, fp32 weights and momentum updated, codes out.

With g the gradient of the summed loss as it left the GPU (bf16), and a multiplier per matrix, or per row of it:
    h = g * multiplier;  m = m + gap * (h - m);  W = W * decay + (momentum_rate * m + gradient_rate * h)     multiplier = -1 / sqrt(S / N)
    unit = sqrt(mean of W^2) / weight_scale;  codes = encode(W * (1 / unit))                                    0 where the unit is 0
The same operations in the same order as in optimizer_step.py and pack_weights.py, one fp32 rounding each, and the sum of squares of
flat_blocks.py, which has no order: the result is, bit for bit, what these make of the same gradient on a GPU.

Two ways to compute it, with the same bits: C over all threads (host_native.py: W and m are read and written once, codes are made while W
is in the cache), or torch in blocks that stay in the cache. Codes other than int8 are made by torch. The caller's threads are free
meanwhile: both release the interpreter's lock.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tscale_kernels import limits
from tscale_kernels.codes import encode, weight_scale
from tscale_kernels.flat_blocks import BLOCK_GROUPS, GROUP, Span, ref_block_squares
from tscale_kernels.host_native import host_library
from tscale_kernels.optimizer_step import GRADIENT_WEIGHT, MOMENTUM_WEIGHT, step_scalars

HostBackendName = Literal["torch", "native"]
_BLOCK = GROUP * BLOCK_GROUPS


@dataclass(frozen=True, slots=True)
class HostBackend:
    """Which way is taken, with how many threads, and why. `library` is None for torch, which takes torch's own threads."""

    name: HostBackendName
    reason: str
    threads: int
    library: ctypes.CDLL | None = None


@dataclass(frozen=True, slots=True)
class HostScalars:
    """The numbers of a step, each an fp32 value."""

    gap: float
    """1 - beta."""
    decay: float
    """1 - rate * l2."""
    momentum_rate: float
    gradient_rate: float
    inverse_count: float
    """1 / N."""

    @classmethod
    def of(cls, rate: float, beta: float, count: float, l2: float = 0.0) -> HostScalars:
        """Rounded as `optimizer_step` rounds them."""
        wide = [np.float32(value) for value in step_scalars(rate, beta, count, l2)]
        parts = (wide[1], wide[3], wide[0] * np.float32(MOMENTUM_WEIGHT), wide[0] * np.float32(GRADIENT_WEIGHT), wide[2])
        return cls(*(float(part) for part in parts))


def choose_host(threads: int, forced: HostBackendName | None = None, cache_folder: Path | None = None) -> HostBackend:
    """C with so many threads if it can be built here, else torch. Raises ValueError if "native" is forced and impossible."""
    if forced == "torch":
        return HostBackend("torch", "asked for by the caller", threads)
    library = host_library(cache_folder)
    if library.functions is None:
        if forced == "native":
            raise ValueError(library.reason)
        return HostBackend("torch", library.reason, threads)
    return HostBackend("native", library.reason, threads, library.functions)


def blocks(elements: int) -> int:
    """Length of `weight_squares` of a matrix."""
    return -(-elements // _BLOCK)


# -- reference: torch, whole matrix at once ----------------------------------------------------------------------------


def ref_update(
    weights: Tensor, momentum: Tensor, gradient: Tensor, *, multipliers: Tensor, scalars: HostScalars, weight_squares: Tensor
) -> None:
    """See `update`."""
    spread = multipliers.repeat_interleave(_columns(weights, multipliers))
    _update_part(weights.view(-1), momentum.view(-1), gradient.view(-1), spread, scalars, torch.empty(2, weights.numel()))
    weight_squares.copy_(ref_block_squares(weights.view(-1), [Span(0, weights.numel())]))


def unit_of(weight_squares: Tensor, elements: int, code: torch.dtype) -> float:
    """Unit of a matrix whose blocks have these sums of squares; an fp32 value, rounded as in pack_weights.py."""
    mean = np.float32(weight_squares.sum().item()) / np.float32(elements)
    return float(np.float32(np.sqrt(np.float64(mean))) * np.float32(1.0 / weight_scale(code)))


def inverse_unit(unit: float) -> float:
    """What weights are multiplied by: 0 for a matrix of zeros."""
    return float(np.float32(1.0) / np.float32(unit)) if unit > 0 else 0.0


def ref_encode_weights(weights: Tensor, unit: float, codes: Tensor) -> None:
    """See `encode_weights`."""
    codes.view(-1).copy_(encode(weights.view(-1) * inverse_unit(unit), codes.dtype))


def ref_row_squares(gradient: Tensor) -> Tensor:
    """See `row_squares`."""
    return gradient.double().square().sum(1)


def _columns(weights: Tensor, multipliers: Tensor) -> int:
    """Elements that share a multiplier."""
    if weights.numel() % GROUP or not multipliers.numel() or weights.numel() % (multipliers.numel() * GROUP):
        raise ValueError(f"{multipliers.numel()} multipliers for {weights.numel()} weights: rows must be multiples of {GROUP}")
    return weights.numel() // multipliers.numel()


def _update_part(w: Tensor, m: Tensor, g: Tensor, multipliers: Tensor | float, scalars: HostScalars, scratch: Tensor) -> None:
    """Flat parts of equal length, scratch fp32 [2, at least that]; every operation one rounding."""
    h, step = scratch[:, : w.numel()]
    h.copy_(g).mul_(multipliers)
    torch.sub(h, m, out=step).mul_(scalars.gap)
    m.add_(step)
    torch.mul(m, scalars.momentum_rate, out=step).add_(h.mul_(scalars.gradient_rate))
    w.mul_(scalars.decay).add_(step)


# -- torch, in blocks that stay in the cache ---------------------------------------------------------------------------


def _torch_update(weights: Tensor, momentum: Tensor, gradient: Tensor, multipliers: Tensor, scalars: HostScalars, squares: Tensor) -> None:
    w, m, g = weights.view(-1), momentum.view(-1), gradient.view(-1)
    columns = _columns(weights, multipliers)
    scratch = torch.empty(2, min(w.numel(), limits.host_block_elements))
    single = float(multipliers) if multipliers.numel() == 1 else None
    for first in range(0, w.numel(), limits.host_block_elements):
        part = slice(first, min(w.numel(), first + limits.host_block_elements))
        if single is None:
            row, last_row = part.start // columns, -(-part.stop // columns)
            spread = multipliers[row:last_row].repeat_interleave(columns)
            _update_part(w[part], m[part], g[part], spread[part.start - row * columns : part.stop - row * columns], scalars, scratch)
        else:
            _update_part(w[part], m[part], g[part], single, scalars, scratch)
        squares[first // _BLOCK : blocks(part.stop)] = ref_block_squares(w[part], [Span(0, part.stop - part.start)])


# -- run ---------------------------------------------------------------------------------------------------------------


def update(
    weights: Tensor, momentum: Tensor, gradient: Tensor, *, multipliers: Tensor, scalars: HostScalars, weight_squares: Tensor,
    host: HostBackend,
) -> None:  # fmt: skip
    """Update one matrix in place, and leave the sums of squares of its new weights.

    weights, momentum: fp32; gradient: bf16; all [R, C] or flat, contiguous, on the CPU, R * C a multiple of 128. multipliers: fp32 [1], or
    [R] with C a multiple of 128. weight_squares: fp64 [blocks(R * C)]. Raises ValueError where sizes do not match.
    """
    columns = _columns(weights, multipliers)
    if not weights.numel() == momentum.numel() == gradient.numel() or weight_squares.numel() != blocks(weights.numel()):
        raise ValueError(
            f"weights of {weights.numel()}, momentum of {momentum.numel()}, gradient of {gradient.numel()} elements and "
            f"{weight_squares.numel()} sums do not belong together"
        )
    _check(weights=(weights, torch.float32), momentum=(momentum, torch.float32), gradient=(gradient, torch.bfloat16))
    if host.library is None:
        _torch_update(weights, momentum, gradient, multipliers, scalars, weight_squares)
        return
    _check(multipliers=(multipliers, torch.float32), weight_squares=(weight_squares, torch.float64))
    host.library.tscale_update(
        weights.data_ptr(), momentum.data_ptr(), gradient.data_ptr(), multipliers.data_ptr(), weight_squares.data_ptr(), weights.numel(),
        columns, scalars.gap, scalars.decay, scalars.momentum_rate, scalars.gradient_rate, host.threads,
    )  # fmt: skip


def weight_squares_of(weights: Tensor, weight_squares: Tensor, host: HostBackend) -> None:
    """Sums of squares of weights that somebody else changed. weights: fp32, contiguous, on the CPU. weight_squares: fp64 [blocks]."""
    _check(weights=(weights, torch.float32), weight_squares=(weight_squares, torch.float64))
    if host.library is not None:
        host.library.tscale_weight_squares(weights.data_ptr(), weight_squares.data_ptr(), weights.numel(), host.threads)
        return
    flat = weights.view(-1)
    for first in range(0, flat.numel(), limits.host_block_elements):
        last = min(flat.numel(), first + limits.host_block_elements)
        weight_squares[first // _BLOCK : blocks(last)] = ref_block_squares(flat[first:last], [Span(0, last - first)])


def encode_weights(weights: Tensor, unit: float, codes: Tensor, host: HostBackend) -> None:
    """codes = encode(weights * (1 / unit)). weights: fp32; codes: a code dtype; same number of elements, contiguous, on the CPU."""
    _check(weights=(weights, torch.float32), codes=(codes, codes.dtype))
    if host.library is not None and codes.dtype == torch.int8:
        host.library.tscale_encode_int8(weights.data_ptr(), codes.data_ptr(), weights.numel(), inverse_unit(unit), host.threads)
        return
    flat, out = weights.view(-1), codes.view(-1)
    for first in range(0, flat.numel(), limits.host_block_elements):
        ref_encode_weights(flat[first : first + limits.host_block_elements], unit, out[first : first + limits.host_block_elements])


def add_gradient(total: Tensor, part: Tensor, host: HostBackend) -> None:
    """total += part, rounded to bf16 once per element. Both bf16, same number of elements, contiguous, on the CPU."""
    _check(total=(total, torch.bfloat16), part=(part, torch.bfloat16))
    if host.library is not None:
        host.library.tscale_add_gradient(total.data_ptr(), part.data_ptr(), total.numel(), host.threads)
        return
    sums, parts = total.view(-1), part.view(-1)
    for first in range(0, sums.numel(), limits.host_block_elements):
        here = slice(first, first + limits.host_block_elements)
        sums[here] = sums[here].float().add_(parts[here].float()).to(torch.bfloat16)


def row_squares(gradient: Tensor, out: Tensor, host: HostBackend) -> None:
    """out[r] = sum of the squares of row r in fp64, exact while they span less than some 2**30: after rounding to fp32 the same everywhere.

    gradient: bf16 [R, C], C a multiple of 128; out: fp64 [R].
    """
    rows, columns = gradient.shape
    if columns % GROUP or out.numel() != rows:
        raise ValueError(f"rows of {columns} elements must be multiples of {GROUP}, and {rows} sums be asked for, not {out.numel()}")
    _check(gradient=(gradient, torch.bfloat16), out=(out, torch.float64))
    if host.library is not None:
        host.library.tscale_row_squares(gradient.data_ptr(), out.data_ptr(), rows, columns, host.threads)
        return
    each = max(1, limits.host_block_elements // columns)
    for first in range(0, rows, each):
        out[first : first + each] = ref_row_squares(gradient[first : first + each])


def _check(**tensors: tuple[Tensor, torch.dtype]) -> None:
    """C gets bare pointers, so nothing else may reach it."""
    for name, (tensor, dtype) in tensors.items():
        if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype} on the CPU, not {tensor.dtype} on {tensor.device}")
