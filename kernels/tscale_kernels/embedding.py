"""The bottom of the model: labels to the start state and its codes, and the gradient of the embedding.

    x[t] = sum over k of signs[t, k] * table[labels[t, k]]         a label below 0 adds nothing (padding rows)
    n = codes of normalise(x), per group of 128 channels           the RMS of each group is stored (normalise.py)
    grad[r] += sum over all (t, k) with labels[t, k] = r of signs[t, k] * dx[t]
The table is read in fp32: no product of it is ever made.

The gradient is the same at every run: entries (t, k) are sorted by label (stable) and cut in chunks of CHUNK. A stretch of equal labels
that lies within a chunk is summed and added to grad by one program. A stretch that crosses chunks leaves one partial sum per chunk, and a
second pass adds these up in a fixed order; so a token that makes up 15 % of a batch costs no more than others, and no two programs add to
one row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.codes import encode, vector_scale
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.launch_table import fitted, launch
from tscale_kernels.normalise import GROUP_CHANNELS, ref_normalise
from tscale_kernels.tiles import capability

CHUNK = 32
"""Sorted entries that one program sums."""

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_embed_normalise(labels: Tensor, signs: Tensor, table: Tensor, *, x: Tensor, n: Tensor, rms: Tensor) -> None:
    """See `embed_normalise`."""
    state = torch.zeros_like(x, dtype=table.dtype)
    for k in range(labels.shape[1]):
        label, sign = labels[:, k : k + 1], signs.to(table.dtype).expand(labels.shape)[:, k : k + 1]
        state += torch.where(label >= 0, table[label[:, 0].clamp_min(0)], 0.0) * sign
    x.copy_(state)
    scaled, root = ref_normalise(state, vector_scale(n.dtype))
    n.copy_(encode(scaled, n.dtype))
    rms.copy_(root.T)


def ref_embedding_gradient(dx: Tensor, labels: Tensor, signs: Tensor, *, grad: Tensor) -> None:
    """See `embedding_gradient`."""
    weights = torch.where(labels >= 0, signs.to(grad.dtype).expand(labels.shape), 0.0)
    for k in range(labels.shape[1]):
        grad.index_add_(0, labels[:, k].clamp_min(0), dx.to(grad.dtype) * weights[:, k : k + 1])


# -- Triton ------------------------------------------------------------------------------------------------------------

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.codes import encode_tile
    from tscale_kernels.normalise import normalise_tile

    @triton.jit
    def embed_kernel(  # type: ignore[no-untyped-def]
        labels, signs, table, x, n, rms, rows, width, scale, LABELS: tl.constexpr, SIGN_STRIDE: tl.constexpr, BR: tl.constexpr
    ):
        """BR positions (program_id(0)) of one group of 128 channels (program_id(1)). SIGN_STRIDE: LABELS, or 0 for signs [LABELS]."""
        row = tl.program_id(0) * BR + tl.arange(0, BR)
        channel = tl.program_id(1) * 128 + tl.arange(0, 128)
        state = tl.zeros((BR, 128), tl.float32)
        for k in tl.static_range(LABELS):
            label = tl.load(labels + row * LABELS + k)
            sign = tl.load(signs + row * SIGN_STRIDE + k)
            taken = tl.load(table + label[:, None] * width + channel[None, :], mask=(label >= 0)[:, None], other=0.0)
            state += taken * sign[:, None]
        normal, root = normalise_tile(state, scale, BR, 128)
        place = row[:, None].to(tl.int64) * width + channel[None, :]
        tl.store(x + place, state.to(x.dtype.element_ty))
        tl.store(n + place, encode_tile(normal, n.dtype.element_ty))
        tl.store(rms + tl.program_id(1) * rows + row[:, None] + tl.arange(0, 1)[None, :], root)

    @triton.jit
    def sum_chunks_kernel(  # type: ignore[no-untyped-def]
        dx, sorted_labels, order, signs, grad, partial, entries, width,
        LABELS: tl.constexpr, SIGN_STRIDE: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        """Sums of the stretches within chunk program_id(1), BC channels from program_id(0) * BC.

        partial [chunks, 2, width] gets in row 0 the sum of a stretch that began before the chunk, in row 1 that of one that ends behind it.
        """
        chunk = tl.program_id(1)
        place = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = place < entries
        label = tl.load(sorted_labels + place, mask=inside, other=-1)
        before = tl.load(sorted_labels + place - 1, mask=inside & (place > 0), other=-2)
        behind = tl.load(sorted_labels + (chunk + 1) * CHUNK, mask=(chunk + 1) * CHUNK < entries, other=-2)
        entry = tl.load(order + place, mask=inside, other=0).to(tl.int32)
        row, k = entry // LABELS, entry % LABELS
        sign = tl.load(signs + row * SIGN_STRIDE + k)
        channel = tl.program_id(0) * BC + tl.arange(0, BC)
        use = (inside & (label >= 0))[:, None] & (channel < width)[None, :]
        values = tl.load(dx + row[:, None].to(tl.int64) * width + channel[None, :], mask=use, other=0.0).to(tl.float32) * sign[:, None]
        begins = (label != before) & inside
        stretch = tl.cumsum(begins.to(tl.int32), axis=0)
        first, last = tl.min(stretch, axis=0), tl.max(stretch, axis=0)
        for current in range(first, last + 1):
            mine = (stretch == current) & inside
            total = tl.sum(tl.where(mine[:, None], values, 0.0), axis=0)
            of = tl.max(tl.where(mine, label, -1), axis=0)
            if of >= 0:
                if current == 0:
                    tl.store(partial + chunk.to(tl.int64) * 2 * width + channel, total, mask=channel < width)
                elif (current == last) & (of == behind):
                    tl.store(partial + (chunk.to(tl.int64) * 2 + 1) * width + channel, total, mask=channel < width)
                else:  # no other program adds to this row, so the order of atomics does not matter
                    tl.atomic_add(grad + of.to(tl.int64) * width + channel, total, mask=channel < width, sem="relaxed")

    @triton.jit
    def join_chunks_kernel(  # type: ignore[no-untyped-def]
        sorted_labels, grad, partial, entries, width, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BC: tl.constexpr
    ):
        """Adds up the stretch that begins within chunk program_id(1) and ends in a later one; nothing to do where there is none."""
        chunk = tl.program_id(1).to(tl.int64)
        end = (chunk + 1) * CHUNK
        of = tl.load(sorted_labels + end - 1, mask=end < entries, other=-1)
        behind = tl.load(sorted_labels + end, mask=end < entries, other=-2)
        first = tl.load(sorted_labels + chunk * CHUNK)
        before = tl.load(sorted_labels + chunk * CHUNK - 1, mask=chunk > 0, other=-2)
        if (of >= 0) & (of == behind) & ((first != of) | (before != of)):
            channel = tl.program_id(0) * BC + tl.arange(0, BC)
            inside = channel < width
            total = tl.load(partial + (chunk * 2 + 1) * width + channel, mask=inside, other=0.0)
            here = chunk + 1
            while here >= 0:
                later = here + tl.arange(0, CHUNKS)
                goes_on = tl.load(sorted_labels + later * CHUNK, mask=later * CHUNK < entries, other=-2) == of
                parts = tl.load(partial + later[:, None] * 2 * width + channel[None, :], mask=goes_on[:, None] & inside[None, :], other=0.0)
                total += tl.sum(parts, axis=0)
                here = tl.where(tl.min(goes_on.to(tl.int32), axis=0) == 1, here + CHUNKS, -1)
            tl.atomic_add(grad + of.to(tl.int64) * width + channel, total, mask=inside, sem="relaxed")


def _sign_stride(labels: Tensor, signs: Tensor) -> int:
    return labels.shape[1] if signs.dim() == 2 else 0


def _launch_embed(labels: Tensor, signs: Tensor, table: Tensor, x: Tensor, n: Tensor, rms: Tensor) -> None:
    rows, width = x.shape
    config = launch("embed_normalise", capability(x.device))
    embed_kernel[(rows // config["BR"], width // GROUP_CHANNELS)](
        labels, signs, table, x, n, rms, rows, width, vector_scale(n.dtype), LABELS=labels.shape[1],
        SIGN_STRIDE=_sign_stride(labels, signs), enable_fp_fusion=False, **config,
    )  # fmt: skip


def _launch_gradient(dx: Tensor, labels: Tensor, signs: Tensor, grad: Tensor, partial: Tensor) -> None:
    entries, width = labels.numel(), dx.shape[1]
    sorted_labels, order = torch.sort(labels.view(-1).to(torch.int32), stable=True)
    config = fitted(launch("embedding_gradient", capability(dx.device)), BC=width)
    chunks_at_once = config.pop("CHUNKS")
    grid = (width // config["BC"], -(-entries // CHUNK))
    sum_chunks_kernel[grid](
        dx, sorted_labels, order, signs, grad, partial, entries, width, LABELS=labels.shape[1], SIGN_STRIDE=_sign_stride(labels, signs),
        CHUNK=CHUNK, **config,
    )  # fmt: skip
    join_chunks_kernel[grid](sorted_labels, grad, partial, entries, width, CHUNK=CHUNK, CHUNKS=chunks_at_once, **config)


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
    if choose(x.device, backend).name == "triton":
        _launch_embed(labels, signs, table, x, n, rms)
    else:
        ref_embed_normalise(labels, signs, table, x=x, n=n, rms=rms)


def embedding_gradient(
    dx: Tensor, labels: Tensor, signs: Tensor, *, grad: Tensor, partial: Tensor | None = None, backend: BackendName | None = None
) -> None:
    """Add the gradient of the table to `grad`.

    dx: fp32 or bf16 [M, E], gradient of the start state. labels, signs: as in `embed_normalise`. grad: fp32 [rows, E]. partial: fp32
    scratch of `partial_shape(M, K, E)`, needed by Triton, which also sorts the labels with torch (that allocates; a CUDA graph keeps it).
    Raises ValueError where shapes do not match or the scratch is missing.
    """
    _check(labels, signs, grad, dx)
    if choose(dx.device, backend).name != "triton":
        ref_embedding_gradient(dx, labels, signs, grad=grad)
        return
    shape = partial_shape(labels.shape[0], labels.shape[1], dx.shape[1])
    if partial is None or partial.shape != shape:
        raise ValueError(f"the embedding gradient needs scratch of {shape}, not {None if partial is None else tuple(partial.shape)}")
    _launch_gradient(dx, labels, signs, grad, partial)


def _check(labels: Tensor, signs: Tensor, table: Tensor, x: Tensor) -> None:
    rows, count = labels.shape
    good = signs.shape in ((rows, count), (count,)) and x.shape == (rows, table.shape[1])
    if not good or rows % GROUP_CHANNELS or x.shape[1] % GROUP_CHANNELS:
        shapes = [tuple(tensor.shape) for tensor in (labels, signs, table, x)]
        raise ValueError("labels {}, signs {}, table {} and state {} do not match".format(*shapes))
