"""Placing codes: codes of one matrix that were made elsewhere, put in the order that the matrix kernels read, with a transposed copy.

    codes[r, c] = source[row_map[r], column_map[c]]     rows from `rows of source` on are zero
    codes_t[c, r] = codes[r, c]
The second half of pack_weights.py, for weights that live in host memory: the host makes the codes (host_update.py), this moves bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.launch_table import launch
from tscale_kernels.tiles import capability

_TILE = 128
_AS_INTEGERS = {1: torch.int8, 2: torch.int16}

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_place_codes(source: Tensor, *, row_map: Tensor | None, column_map: Tensor | None, codes: Tensor, codes_t: Tensor | None) -> None:
    """See `place_codes`."""
    placed = _integers(source) if row_map is None else _integers(source)[row_map.to(torch.int64)]
    if column_map is not None:
        placed = placed[:, column_map.to(torch.int64)]
    rows, out = source.shape[0], _integers(codes)
    out[:rows] = placed
    out[rows:] = 0
    if codes_t is not None:
        _integers(codes_t).copy_(out.T)


def _integers(codes: Tensor) -> Tensor:
    """The same bits as integers: moving numbers must not change them."""
    return codes.view(_AS_INTEGERS[codes.element_size()])


# -- Triton ------------------------------------------------------------------------------------------------------------

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def place_kernel(  # type: ignore[no-untyped-def]
        source, row_map, column_map, codes, codes_t, rows, padded_rows, columns,
        ROWS_MAPPED: tl.constexpr, COLUMNS_MAPPED: tl.constexpr, TRANSPOSED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        """One tile of BR x BC. source, codes, codes_t: pointers to integers of one width; maps: int32."""
        column_tiles = columns // BC
        place = (tl.program_id(0) // column_tiles) * BR + tl.arange(0, BR)
        slot = (tl.program_id(0) % column_tiles) * BC + tl.arange(0, BC)
        row, column = place, slot
        if ROWS_MAPPED:
            row = tl.load(row_map + place, mask=place < rows, other=0)
        if COLUMNS_MAPPED:
            column = tl.load(column_map + slot)
        b_code = tl.load(source + row[:, None].to(tl.int64) * columns + column[None, :], mask=(place < rows)[:, None], other=0)
        tl.store(codes + place[:, None].to(tl.int64) * columns + slot[None, :], b_code)
        if TRANSPOSED:
            tl.store(codes_t + slot[:, None].to(tl.int64) * padded_rows + place[None, :], tl.trans(b_code))


def _launch_place(source: Tensor, row_map: Tensor | None, column_map: Tensor | None, codes: Tensor, codes_t: Tensor | None) -> None:
    (rows, columns), padded_rows = source.shape, codes.shape[0]
    out, config = _integers(codes), launch("place_codes", capability(codes.device))
    place_kernel[(padded_rows // config["BR"] * (columns // config["BC"]),)](
        _integers(source), out if row_map is None else row_map, out if column_map is None else column_map, out,
        out if codes_t is None else _integers(codes_t), rows, padded_rows, columns, ROWS_MAPPED=row_map is not None,
        COLUMNS_MAPPED=column_map is not None, TRANSPOSED=codes_t is not None, **config,
    )  # fmt: skip


# -- run ---------------------------------------------------------------------------------------------------------------


def place_codes(
    source: Tensor,
    *,
    row_map: Tensor | None,
    column_map: Tensor | None,
    codes: Tensor,
    codes_t: Tensor | None,
    backend: BackendName | None = None,
) -> None:
    """Put codes in kernel order.

    source: code dtype [R, C], canonical order. row_map int32 [R], column_map int32 [C]: row and column of source at each place; None = as
    they are. codes: [R rounded up to 128, C]. codes_t: [C, R rounded up to 128] or None. C a multiple of 128; all contiguous, of one dtype
    and device. Raises ValueError where shapes do not match.
    """
    padded_rows, columns = -(-source.shape[0] // _TILE) * _TILE, source.shape[1]
    if codes.shape != (padded_rows, columns) or (codes_t is not None and codes_t.shape != (columns, padded_rows)) or columns % _TILE:
        transposed = None if codes_t is None else tuple(codes_t.shape)
        raise ValueError(
            f"codes {tuple(codes.shape)}, transposed {transposed} do not fit a source of {tuple(source.shape)} in tiles of {_TILE}"
        )
    if choose(codes.device, backend).name == "triton":
        _launch_place(source, row_map, column_map, codes, codes_t)
    else:
        ref_place_codes(source, row_map=row_map, column_map=column_map, codes=codes, codes_t=codes_t)
