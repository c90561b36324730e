"""The top of the model: final layer, cross-entropy and their gradients, without ever storing the logits.

    logit[t, c] = (n[t] . w[c]) * unit / (vector_scale * sqrt(E)) + bias[c]         natural units; bias -1e30 on padding columns
    total[t] = log sum over c of exp logit[t, c];  losses[t] = total[t] - logit[t, target[t]], 0 where target[t] is -1
    d_logit[t, c] = exp(logit[t, c] - total[t]) - (c is target[t]), 0 where target[t] is -1
    d_n[t] = sum over c of d_logit[t, c] * w[c] * unit / sqrt(E);  grad[c] += sum over t of d_logit[t, c] * n[t] / (vector_scale * sqrt(E))
The product of codes is made twice. Pass 1 keeps of every tile its row maximum and sum of exponentials; these are joined in a fixed order.
Pass 2 takes a chunk of rows, makes its logits again (the same bits) and writes d_logit, times unit / sqrt(E), in bf16; from these come both
gradients as bf16 products with fp32 sums. The codes are exact in bf16, so the first product is d_n itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from tscale_kernels import tiles
from tscale_kernels.codes import ref_product, vector_scale
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.launch_table import fitted, launch

NO_TARGET = -1
PADDING_BIAS = -1e30
"""Bias of columns beyond the vocabulary: their exponential is exactly 0."""
CHUNK_BYTES = 1 << 29
"""Most bytes of d_logit in the default chunk: 5 000 rows of a vocabulary of 50 000, whose products fill a card."""
VOCAB_TILE = 128
"""Fewest columns whose statistics pass 1 keeps together: the size of the scratch follows from it."""
_LOG2_E = 1.4426950408889634

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
    def allocate(
        rows: int, padded_vocab: int, width: int, device: torch.device | str, *, gradient: bool = True, chunk: int = 0
    ) -> HeadScratch:
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


# -- Triton ------------------------------------------------------------------------------------------------------------
# Logits are kept times log2(e), so that exponentials are powers of two.

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.tiles import load_tile, product_tile, store_tile, tile_position

    @triton.jit
    def logits_tile(  # type: ignore[no-untyped-def]
        n, w, unit, bias, row, column, depth, factor,
        BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, TMA: tl.constexpr,
    ):  # fmt: skip
        """[BR, BC] logits in units of ln 2. factor: log2(e) / (vector_scale * sqrt(E))."""
        sums = product_tile(n, w, row, column, 0, depth // BK, depth, depth, BR, BC, BK, ACC, TMA)
        shift = tl.load(bias + column + tl.arange(0, BC)) * 1.4426950408889634
        return sums.to(tl.float32) * (tl.load(unit) * factor) + shift[None, :]

    @triton.jit
    def statistics_kernel(  # type: ignore[no-untyped-def]
        n, w, unit, bias, target, statistics, chosen, rows, row_tiles, column_tiles, depth, factor,
        ACC: tl.constexpr, TMA: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """Pass 1 of one tile: statistics [2, column tiles, rows] gets row maxima and sums of exponentials, chosen [rows] target logits."""
        row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, column_tiles, GROUP)
        row, column = row_tile * BR, column_tile * BC
        logits = logits_tile(n, w, unit, bias, row, column, depth, factor, BR, BC, BK, ACC, TMA)
        peak = tl.max(logits, axis=1)
        total = tl.sum(tl.exp2(logits - peak[:, None]), axis=1)
        place = row + tl.arange(0, BR)
        statistics += column_tile.to(tl.int64) * rows
        tl.store(statistics + place, peak)
        tl.store(statistics + column_tiles * rows + place, total)
        within = tl.load(target + place).to(tl.int32) - column
        here = (within >= 0) & (within < BC)
        value = tl.sum(tl.where(within[:, None] == tl.arange(0, BC)[None, :], logits, 0.0), axis=1)
        tl.store(chosen + place, value, mask=here)

    @triton.jit
    def losses_kernel(  # type: ignore[no-untyped-def]
        statistics, chosen, target, totals, losses, rows, column_tiles, BR: tl.constexpr, BT: tl.constexpr
    ):
        """BR rows: statistics of all tiles joined, BT tiles at a time; totals get log2 of the sum of exponentials."""
        row = tl.program_id(0) * BR + tl.arange(0, BR)
        peak = tl.full((BR,), -float("inf"), tl.float32)
        total = tl.zeros((BR,), tl.float32)
        for first in range(0, column_tiles, BT):
            tile = first + tl.arange(0, BT)
            mask = (tile < column_tiles)[:, None] & (row < rows)[None, :]
            place = tile[:, None].to(tl.int64) * rows + row[None, :]
            peaks = tl.load(statistics + place, mask=mask, other=-float("inf"))
            sums = tl.load(statistics + column_tiles * rows + place, mask=mask, other=0.0)
            higher = tl.maximum(peak, tl.max(peaks, axis=0))
            total = total * tl.exp2(peak - higher) + tl.sum(sums * tl.exp2(peaks - higher[None, :]), axis=0)
            peak = higher
        log_total = peak + tl.log2(total)
        wanted = tl.load(target + row, mask=row < rows, other=-1)
        value = tl.load(chosen + row, mask=(row < rows) & (wanted >= 0), other=0.0)
        tl.store(totals + row, log_total, mask=row < rows)
        tl.store(losses + row, tl.where(wanted >= 0, (log_total - value) * 0.6931471805599453, 0.0), mask=row < rows)

    @triton.jit
    def loss_sum_kernel(losses, loss_sum, rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """loss_sum [1] += sum of losses [rows], in fp64, by one program."""
        total = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, rows, BLOCK):
            row = first + tl.arange(0, BLOCK)
            total += tl.load(losses + row, mask=row < rows, other=0.0).to(tl.float64)
        tl.store(loss_sum, tl.load(loss_sum) + tl.sum(total, axis=0))

    @triton.jit
    def error_kernel(  # type: ignore[no-untyped-def]
        n, w, unit, bias, target, totals, error, first_row, row_tiles, column_tiles, depth, factor, inverse_root,
        ACC: tl.constexpr, TMA: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """Pass 2 of one tile of the chunk that starts at first_row: error (operand of the chunk, bf16)."""
        row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, column_tiles, GROUP)
        row, column = row_tile * BR, column_tile * BC
        logits = logits_tile(n, w, unit, bias, first_row + row, column, depth, factor, BR, BC, BK, ACC, TMA)
        place = first_row + row + tl.arange(0, BR)
        wanted = tl.load(target + place).to(tl.int32)
        chance = tl.exp2(logits - tl.load(totals + place)[:, None])
        chance = tl.where((wanted - column)[:, None] == tl.arange(0, BC)[None, :], chance - 1.0, chance)
        scale = tl.where(wanted >= 0, error_scale(tl.load(unit), inverse_root), 0.0)
        store_tile(error, row, column, column_tiles * BC, (chance * scale[:, None]).to(tl.bfloat16), BR, BC, TMA)

    @triton.jit
    def error_scale(unit, inverse_root):  # type: ignore[no-untyped-def]
        """`_error_scale`."""
        return tl.where(unit > 0, unit, 1.0) * inverse_root

    @triton.jit
    def gradient_kernel(  # type: ignore[no-untyped-def]
        error, n, unit, grad, first_row, row_blocks, vocab, padded_vocab, width, factor, inverse_root,
        SPLIT: tl.constexpr, TMA: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        """grad[v, e] += factor / error_scale * sum over rows of error[row, v] * n[first_row + row, e]: a tile of BR tokens, BC channels.

        The sum goes over row_blocks blocks of BK rows. SPLIT: only over part program_id(1) of them, and grad is scratch
        [parts, padded_vocab, width] that gets the sum as it is.
        """
        column_tiles = width // BC
        v = (tl.program_id(0) // column_tiles) * BR
        e = (tl.program_id(0) % column_tiles) * BC
        blocks = tl.cdiv(row_blocks, tl.num_programs(1))
        start = tl.program_id(1) * blocks
        total = tl.zeros((BR, BC), tl.float32)
        for block in range(start, min(start + blocks, row_blocks)):
            left = load_tile(error, block * BK, v, padded_vocab, BK, BR, TMA)
            right = load_tile(n, first_row + block * BK, e, width, BK, BC, TMA)
            total = tl.dot(left.T, right, total)
        token = v + tl.arange(0, BR)[:, None]
        place = token.to(tl.int64) * width + (e + tl.arange(0, BC))[None, :]
        if SPLIT:
            tl.store(grad + tl.program_id(1).to(tl.int64) * padded_vocab * width + place, total)
        else:
            scale = factor / error_scale(tl.load(unit), inverse_root)
            # A tile has one program, so the order of atomics does not matter; reading the old values would need too many registers.
            tl.atomic_add(grad + place, total * scale, mask=(token < vocab) & (place >= 0), sem="relaxed")

    @triton.jit
    def join_parts_kernel(  # type: ignore[no-untyped-def]
        partial, unit, grad, elements, part_elements, factor, inverse_root, PARTS: tl.constexpr, BLOCK: tl.constexpr
    ):
        """grad [elements] += factor / error_scale * sum of partial [PARTS, part_elements], parts in order."""
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for part in range(PARTS):
            total += tl.load(partial + part * part_elements + place, mask=place < elements, other=0.0)
        scale = factor / error_scale(tl.load(unit), inverse_root)
        tl.store(grad + place, tl.load(grad + place, mask=place < elements, other=0.0) + total * scale, mask=place < elements)


def _launch_losses(
    n: Tensor, w: Tensor, unit: Tensor, bias: Tensor, target: Tensor, losses: Tensor, loss_sum: Tensor, scratch: HeadScratch
) -> None:
    (rows, width), vocab, card, tma = n.shape, w.shape[0], tiles.capability(n.device), tiles.uses_tma(n.device)
    config = fitted(launch("head_statistics", card, n.dtype), BR=rows, BC=vocab, BK=width)
    row_tiles, column_tiles = rows // config["BR"], vocab // config["BC"]
    statistics_kernel[(row_tiles * column_tiles,)](
        tiles.operand(n, config["BR"], config["BK"], tma), tiles.operand(w, config["BC"], config["BK"], tma), unit, bias, target,
        scratch.statistics, scratch.chosen, rows, row_tiles, column_tiles, width, _LOG2_E / (vector_scale(n.dtype) * sqrt(width)),
        ACC=tiles.accumulator(n.dtype), TMA=tma, enable_fp_fusion=False, **config,
    )  # fmt: skip
    config = launch("head_losses", card)
    losses_kernel[(triton.cdiv(rows, config["BR"]),)](
        scratch.statistics, scratch.chosen, target, scratch.total, losses, rows, column_tiles, **config
    )
    loss_sum_kernel[(1,)](losses, loss_sum, rows, BLOCK=4096, num_warps=8)


def _launch_gradients(
    n: Tensor, w: Tensor, unit: Tensor, bias: Tensor, target: Tensor, d_n: Tensor, grad: Tensor, scratch: HeadScratch
) -> None:
    rows = n.shape[0]
    n_half, w_half = n, w
    if n.dtype != torch.bfloat16:
        n_half, w_half = scratch.n_half.copy_(n), scratch.w_half.copy_(w)
    chunk = scratch.error.shape[0]
    for first in range(0, rows, chunk):
        error = scratch.error[: min(chunk, rows - first)]
        _launch_error(n, w, unit, bias, target, error, first, scratch)
        _launch_final_gradient(error, n_half, unit, grad, first, _gradient_factor(n), scratch)
        torch.mm(error, w_half, out=d_n[first : first + error.shape[0]])


def _launch_error(
    n: Tensor, w: Tensor, unit: Tensor, bias: Tensor, target: Tensor, error: Tensor, first: int, scratch: HeadScratch
) -> None:
    width, (rows, vocab), tma = n.shape[1], error.shape, tiles.uses_tma(n.device)
    config = fitted(launch("head_error", tiles.capability(n.device), n.dtype), BR=rows, BC=vocab, BK=width)
    row_tiles, column_tiles = rows // config["BR"], vocab // config["BC"]
    error_kernel[(row_tiles * column_tiles,)](
        tiles.operand(n, config["BR"], config["BK"], tma), tiles.operand(w, config["BC"], config["BK"], tma), unit, bias, target,
        scratch.total, tiles.operand(error, config["BR"], config["BC"], tma), first, row_tiles, column_tiles, width,
        _LOG2_E / (vector_scale(n.dtype) * sqrt(width)), 1.0 / sqrt(width), ACC=tiles.accumulator(n.dtype), TMA=tma,
        enable_fp_fusion=False, **config,
    )  # fmt: skip


def _gradient_factor(n: Tensor) -> float:
    return 1.0 / (vector_scale(n.dtype) * sqrt(n.shape[1]))


def _launch_final_gradient(
    error: Tensor, n_half: Tensor, unit: Tensor, grad: Tensor, first: int, factor: float, scratch: HeadScratch
) -> None:
    (rows, padded_vocab), width, tma = error.shape, n_half.shape[1], tiles.uses_tma(error.device)
    card, inverse_root = tiles.capability(error.device), 1.0 / sqrt(n_half.shape[1])
    config = fitted(launch("head_gradient", card), BR=padded_vocab, BC=width, BK=rows)
    parts = scratch.partial.shape[0]
    gradient_kernel[((padded_vocab // config["BR"]) * (width // config["BC"]), max(1, parts))](
        tiles.operand(error, config["BK"], config["BR"], tma), tiles.operand(n_half, config["BK"], config["BC"], tma), unit,
        scratch.partial if parts else grad, first, rows // config["BK"], grad.shape[0], padded_vocab, width, factor, inverse_root,
        SPLIT=parts > 0, TMA=tma, **config,
    )  # fmt: skip
    if parts:
        join_parts_kernel[(triton.cdiv(grad.numel(), 1024),)](
            scratch.partial, unit, grad, grad.numel(), padded_vocab * width, factor, inverse_root, PARTS=parts, BLOCK=1024
        )


# -- run ---------------------------------------------------------------------------------------------------------------


def loss(
    n: Tensor, w: Tensor, unit: Tensor, bias: Tensor, target: Tensor, *, losses: Tensor, loss_sum: Tensor,
    scratch: HeadScratch | None = None, backend: BackendName | None = None,
) -> None:  # fmt: skip
    """Cross-entropy of every position, nothing else (evaluation). Arguments as in `loss_and_gradient`."""
    _check(n, w, bias, target)
    if choose(n.device, backend).name == "triton":
        _launch_losses(n, w, unit, bias, target, losses, loss_sum, _checked(scratch, n, w, 0))
    else:
        ref_loss(n, w, unit, bias, target, losses=losses, loss_sum=loss_sum)


def loss_and_gradient(
    n: Tensor, w: Tensor, unit: Tensor, bias: Tensor, target: Tensor, *, losses: Tensor, loss_sum: Tensor, d_n: Tensor, grad: Tensor,
    scratch: HeadScratch | None = None, backend: BackendName | None = None,
) -> None:  # fmt: skip
    """Cross-entropy of every position, and the gradients of its sum.

    n: codes [M, E]. w: codes of the same dtype [VP, E], zero beyond the vocabulary. unit: fp32 [1]. bias: fp32 [VP], natural units,
    PADDING_BIAS beyond the vocabulary. target: int64 [M], -1 = none. losses: fp32 [M], written. loss_sum: fp64 [1], added to. d_n: bf16
    [M, E], written: gradient of the normalised state (value, not code). grad: fp32 [V, E], V <= VP, added to. scratch: needed by Triton.
    M, E, VP multiples of 128; all contiguous. Raises ValueError where shapes do not match or the scratch is missing.
    """
    _check(n, w, bias, target)
    if d_n.shape != n.shape or grad.shape[0] > w.shape[0] or grad.shape[1] != w.shape[1]:
        raise ValueError(f"d_n {tuple(d_n.shape)} and grad {tuple(grad.shape)} do not fit n {tuple(n.shape)} and w {tuple(w.shape)}")
    if choose(n.device, backend).name == "triton":
        checked = _checked(scratch, n, w, 1)
        _launch_losses(n, w, unit, bias, target, losses, loss_sum, checked)
        _launch_gradients(n, w, unit, bias, target, d_n, grad, checked)
    else:
        ref_loss_and_gradient(n, w, unit, bias, target, losses=losses, loss_sum=loss_sum, d_n=d_n, grad=grad)


def _check(n: Tensor, w: Tensor, bias: Tensor, target: Tensor) -> None:
    if n.dtype != w.dtype or n.shape[1] != w.shape[1] or bias.shape != w.shape[:1] or target.shape != n.shape[:1]:
        shapes = [tuple(tensor.shape) for tensor in (n, w, bias, target)]
        raise ValueError("n {}, w {}, bias {} and target {} do not match".format(*shapes) + f", or {n.dtype} and {w.dtype} do not")
    if n.shape[0] % 128 or n.shape[1] % 128 or w.shape[0] % 128:
        raise ValueError(f"n {tuple(n.shape)} and w {tuple(w.shape)}: all sizes must be multiples of 128")


def _checked(scratch: HeadScratch | None, n: Tensor, w: Tensor, rows: int) -> HeadScratch:
    """The scratch, if it is for these sizes, with at least `rows` rows in a chunk."""
    wanted = (2, w.shape[0] // VOCAB_TILE, n.shape[0])
    if scratch is None or scratch.statistics.shape != wanted or scratch.error.shape[0] < rows:
        raise ValueError(f"the head needs scratch for statistics {wanted}{' and gradients' if rows else ''}: HeadScratch.allocate")
    return scratch
