"""Products whose result is normalised and encoded at once: the projections of attention, the widening half of the feed-forward step.

With lin(n, W) = n W^T / sqrt(E) and, per group of 128 output channels, root = RMS of the group (normalise.py):
    project:  query, key = codes of rotate(lin / root);  gate, value = codes of lin / root;  all four roots are stored
    expand:   hidden = codes of lin / root (int8: never 0 for a negative number);  active = codes of relu(lin / root);  the root is stored
The model does not divide keys by their root (only their codes are of unit RMS): attention multiplies it back. Rotation turns the adjacent
channels 2p, 2p + 1 of a head, p = 0..63, by cosine[t, p], sine[t, p] (that is the row order of packed weights; the model's pairing is
(k, k + 32), see tscale_fed/model/rotary.py); t = row modulo tokens. Turning keeps the RMS, so it is applied to the normalised vector.
The unit of the weights and 1 / sqrt(E) cancel in the codes and only scale the roots.

Exactness: int8 operands give the same bits on every backend and card (integer sums, prescribed order of the RMS, IEEE operations, no fused
multiply-add). With fp8 and bf16 the sums are fp32 in the order of the tensor cores, and a code may differ by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels import launch_table, tiles
from tscale_kernels.codes import encode, ref_product, vector_scale
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.normalise import GROUP_CHANNELS, ref_normalise

SEGMENTS = 4
"""Query, key, gate, value: the row blocks of the joined projection weights."""


# -- reference ---------------------------------------------------------------------------------------------------------


def ref_project(
    n: Tensor, w: Tensor, units: Tensor, *, cosine: Tensor, sine: Tensor,
    query: Tensor, key: Tensor, gate: Tensor, value: Tensor, rms: Tensor,
) -> None:  # fmt: skip
    """See `project`."""
    position = torch.arange(n.shape[0], device=n.device) % cosine.shape[0]
    turn = (cosine[position, None].float(), sine[position, None].float())
    sums = ref_product(n, w).unflatten(1, (SEGMENTS, -1))
    roots = rms.unflatten(0, (SEGMENTS, -1))
    for segment, out in enumerate((query, key, gate, value)):
        scaled, root = ref_normalise(sums[:, segment], vector_scale(out.dtype))
        if segment < 2:
            scaled = ref_rotate(scaled, *turn)
        out.copy_(encode(scaled, out.dtype))
        roots[segment].copy_(root.T * (units[segment] * lin_factor(n)))


def ref_rotate(values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Adjacent pairs of values [M, 128 H] turned by cosine, sine [M, 1, 64]."""
    even, odd = values.unflatten(1, (-1, GROUP_CHANNELS // 2, 2)).unbind(3)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), 3).flatten(1)


def ref_expand(n: Tensor, w: Tensor, unit: Tensor, *, hidden: Tensor, active: Tensor, rms: Tensor) -> None:
    """See `expand`."""
    scaled, root = ref_normalise(ref_product(n, w), vector_scale(hidden.dtype))
    hidden.copy_(encode(ref_keep_sign(scaled) if hidden.dtype == torch.int8 else scaled, hidden.dtype))
    active.copy_(encode(scaled.relu(), active.dtype))
    rms.copy_(root.T * (unit * lin_factor(n)))


def ref_keep_sign(scaled: Tensor) -> Tensor:
    """Numbers between -1 and 0 become -1: int8 has no code for them that relu's derivative could tell from a positive one."""
    return torch.where(scaled < 0, scaled.clamp(max=-1.0), scaled)


def lin_factor(n: Tensor) -> float:
    """What turns a product of vector codes n [M, E] with weight codes into lin / unit."""
    return 1.0 / (vector_scale(n.dtype) * n.shape[1] ** 0.5)


# -- Triton ------------------------------------------------------------------------------------------------------------
# One program per output tile, two programs on each processor of an H100 at once: one multiplies while the other encodes and stores.

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.codes import encode_tile
    from tscale_kernels.normalise import normalise_tile, store_roots
    from tscale_kernels.tiles import product_tile, store_tile, tile_position

    @triton.jit
    def _rotate_half(values, cosine, sine, at, ROWS: tl.constexpr, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
        """32 adjacent pairs of each head, values [ROWS, HEADS, 64], turned by the table elements `at` [ROWS, 32]."""
        c = tl.load(cosine + at).to(tl.float32)[:, None, :]
        s = tl.load(sine + at).to(tl.float32)[:, None, :]
        even, odd = tl.split(tl.reshape(values, (ROWS, HEADS, 32, 2)))
        return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, HEADS, 64))

    @triton.jit
    def rotate_tile(values, cosine, sine, row, tokens, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
        """`ref_rotate` of a tile that starts at `row`, for pointers to [tokens, 64]. Half the channels at a time: fewer registers."""
        HEADS: tl.constexpr = COLUMNS // 128
        at = ((row + tl.arange(0, ROWS)) % tokens)[:, None] * 64 + tl.arange(0, 32)[None, :]
        low, high = tl.split(tl.permute(tl.reshape(values, (ROWS, HEADS, 2, 64)), (0, 1, 3, 2)))
        low = _rotate_half(low, cosine, sine, at, ROWS, HEADS)
        high = _rotate_half(high, cosine, sine, at + 32, ROWS, HEADS)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), (ROWS, COLUMNS))

    @triton.jit
    def project_kernel(  # type: ignore[no-untyped-def]
        n, w, query, key, gate, value, rms, units, cosine, sine,
        row_tiles, column_tiles, width, rows, tokens, factor, query_scale, gate_scale, value_scale,
        QUERY: tl.constexpr, GATE: tl.constexpr, VALUE: tl.constexpr, ACC: tl.constexpr, TMA: tl.constexpr,
        BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """One [BR, BC] tile. n, w and the four outputs are operands (tiles.py), the rest pointers; QUERY, GATE, VALUE are code dtypes."""
        row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, column_tiles, GROUP)
        row = row_tile * BR
        sums = product_tile(n, w, row, column_tile * BC, 0, width // BK, width, width, BR, BC, BK, ACC, TMA).to(tl.float32)
        segment_tiles = column_tiles // 4
        segment = column_tile // segment_tiles
        column = (column_tile % segment_tiles) * BC
        columns = segment_tiles * BC
        scale = tl.where(segment < 2, query_scale, tl.where(segment == 2, gate_scale, value_scale))
        scaled, root = normalise_tile(sums, scale, BR, BC)
        store_roots(rms, root * (tl.load(units + segment) * factor), row, column_tile * BC, rows, BR, BC)
        if segment < 2:
            turned = encode_tile(rotate_tile(scaled, cosine, sine, row, tokens, BR, BC), QUERY)
            if segment == 0:
                store_tile(query, row, column, columns, turned, BR, BC, TMA)
            else:
                store_tile(key, row, column, columns, turned, BR, BC, TMA)
        elif segment == 2:
            store_tile(gate, row, column, columns, encode_tile(scaled, GATE), BR, BC, TMA)
        else:
            store_tile(value, row, column, columns, encode_tile(scaled, VALUE), BR, BC, TMA)

    @triton.jit
    def expand_kernel(  # type: ignore[no-untyped-def]
        n, w, hidden, active, rms, unit, row_tiles, column_tiles, width, rows, factor, scale,
        CODE: tl.constexpr, ACC: tl.constexpr, TMA: tl.constexpr,
        BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """One [BR, BC] tile. n, w, hidden, active are operands (tiles.py), the rest pointers; CODE is the dtype of hidden and active."""
        row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, column_tiles, GROUP)
        row = row_tile * BR
        column = column_tile * BC
        columns = column_tiles * BC
        sums = product_tile(n, w, row, column, 0, width // BK, width, width, BR, BC, BK, ACC, TMA).to(tl.float32)
        scaled, root = normalise_tile(sums, scale, BR, BC)
        store_roots(rms, root * (tl.load(unit) * factor), row, column, rows, BR, BC)
        signed = tl.where(scaled < 0, tl.minimum(scaled, -1.0), scaled) if CODE == tl.int8 else scaled  # ref_keep_sign
        store_tile(hidden, row, column, columns, encode_tile(signed, CODE), BR, BC, TMA)
        store_tile(active, row, column, columns, encode_tile(tl.maximum(scaled, 0.0), CODE), BR, BC, TMA)


def _launch_project(
    n: Tensor, w: Tensor, units: Tensor, *, cosine: Tensor, sine: Tensor,
    query: Tensor, key: Tensor, gate: Tensor, value: Tensor, rms: Tensor,
) -> None:  # fmt: skip
    (rows, width), columns = n.shape, query.shape[1]
    config = launch_table.launch("project", tiles.capability(n.device), n.dtype)
    config = launch_table.fitted(config, BR=rows, BC=columns, BK=width)
    tma = tiles.uses_tma(n.device)
    row_tiles, column_tiles = rows // config["BR"], SEGMENTS * columns // config["BC"]
    project_kernel[(row_tiles * column_tiles,)](
        tiles.operand(n, config["BR"], config["BK"], tma), tiles.operand(w, config["BC"], config["BK"], tma),
        *(tiles.operand(out, config["BR"], config["BC"], tma) for out in (query, key, gate, value)),
        rms, units, cosine, sine, row_tiles, column_tiles, width, rows, cosine.shape[0],
        lin_factor(n), vector_scale(query.dtype), vector_scale(gate.dtype), vector_scale(value.dtype),
        QUERY=tiles.TRITON_DTYPES[query.dtype], GATE=tiles.TRITON_DTYPES[gate.dtype], VALUE=tiles.TRITON_DTYPES[value.dtype],
        ACC=tiles.accumulator(n.dtype), TMA=tma, enable_fp_fusion=False, **config,
    )  # fmt: skip


def _launch_expand(n: Tensor, w: Tensor, unit: Tensor, *, hidden: Tensor, active: Tensor, rms: Tensor) -> None:
    (rows, width), columns = n.shape, hidden.shape[1]
    config = launch_table.launch("expand", tiles.capability(n.device), n.dtype)
    config = launch_table.fitted(config, BR=rows, BC=columns, BK=width)
    tma = tiles.uses_tma(n.device)
    row_tiles, column_tiles = rows // config["BR"], columns // config["BC"]
    expand_kernel[(row_tiles * column_tiles,)](
        tiles.operand(n, config["BR"], config["BK"], tma), tiles.operand(w, config["BC"], config["BK"], tma),
        *(tiles.operand(out, config["BR"], config["BC"], tma) for out in (hidden, active)),
        rms, unit, row_tiles, column_tiles, width, rows, lin_factor(n), vector_scale(hidden.dtype),
        CODE=tiles.TRITON_DTYPES[hidden.dtype], ACC=tiles.accumulator(n.dtype), TMA=tma, enable_fp_fusion=False, **config,
    )  # fmt: skip


# -- run ---------------------------------------------------------------------------------------------------------------


def project(
    n: Tensor, w: Tensor, units: Tensor, *, cosine: Tensor, sine: Tensor,
    query: Tensor, key: Tensor, gate: Tensor, value: Tensor, rms: Tensor, backend: BackendName | None = None,
) -> None:  # fmt: skip
    """Write codes of the rotated query and key and of gate and value, and the RMS of all four.

    n: codes [M, E]. w: codes of the same dtype [4A, E], rows in kernel order (query, key, gate, value). units: fp32 [4].
    cosine, sine: fp32 or fp16 [tokens, 64]. query, key: one code dtype [M, A]. gate, value: any code dtype [M, A]. rms: fp32 [4H, M], rows
    in the order of w. M, E, A multiples of 128; all contiguous. Raises ValueError if shapes or dtypes do not belong together.
    """
    _check(n, w, SEGMENTS * query.shape[1], rms)
    run = _launch_project if choose(n.device, backend).name == "triton" else ref_project
    run(n, w, units, cosine=cosine, sine=sine, query=query, key=key, gate=gate, value=value, rms=rms)


def expand(n: Tensor, w: Tensor, unit: Tensor, *, hidden: Tensor, active: Tensor, rms: Tensor, backend: BackendName | None = None) -> None:
    """Write the codes before and after relu, and the RMS.

    n: codes [M, E]. w: codes of the same dtype [F, E]. unit: fp32 [1]. hidden, active: one code dtype [M, F]. rms: fp32 [F / 128, M].
    M, E, F multiples of 128; all contiguous. Raises ValueError if shapes or dtypes do not belong together.
    """
    _check(n, w, hidden.shape[1], rms)
    run = _launch_expand if choose(n.device, backend).name == "triton" else ref_expand
    run(n, w, unit, hidden=hidden, active=active, rms=rms)


def _check(n: Tensor, w: Tensor, columns: int, rms: Tensor) -> None:
    if n.dtype != w.dtype or w.shape != (columns, n.shape[1]) or rms.shape != (columns // GROUP_CHANNELS, n.shape[0]):
        raise ValueError(f"n {tuple(n.shape)} {n.dtype}, w {tuple(w.shape)} {w.dtype}, rms {tuple(rms.shape)} do not belong together")
