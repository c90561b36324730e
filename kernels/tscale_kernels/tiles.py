"""What all 8-bit matrix products share: the order of tiles, the loop over the contraction, operands by descriptor or by pointer.

Products are a [R, K] times b [C, K] transposed, both with K contiguous: tensor cores take 8-bit operands in no other order, so who needs
the other order stores a transposed copy (`quantize.py`, `pack_weights.py`). R, C and K are multiples of 128.
On sm_90 and newer operands come through TMA descriptors made on the host, below through pointers (there descriptors would spill:
spec/kernels.md 3). A kernel is written once: it gets `a` and `b` as either, and the constant TMA says which.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tscale_kernels.dispatch import has_triton

FIRST_CAPABILITY_WITH_TMA = (9, 0)
_FULL_PROGRAMS = 4
"""Programs per multiprocessor that keep memory busy in kernels that only move data."""
_INTERPRETED_PROCESSORS = 1

if has_triton():
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    TRITON_DTYPES = {
        torch.int8: tl.int8,
        torch.float8_e4m3fn: tl.float8e4nv,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.float32: tl.float32,
    }

    @triton.jit
    def tile_position(tile, row_tiles, column_tiles, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
        """(row tile, column tile) of the tile-th program: GROUP row tiles share their column tiles while these are in the L2 cache."""
        group = tile // (GROUP * column_tiles)
        first_row = group * GROUP
        rows_here = min(row_tiles - first_row, GROUP)
        within = tile % (GROUP * column_tiles)
        return first_row + within % rows_here, within // rows_here

    @triton.jit
    def load_tile(x, row, column, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):  # type: ignore[no-untyped-def]
        """x[row : row + ROWS, column : column + COLUMNS]; row and column are element positions, all inside the matrix."""
        if TMA:
            return x.load([row, column])
        else:
            rows = row + tl.arange(0, ROWS)
            columns = column + tl.arange(0, COLUMNS)
            return tl.load(x + rows[:, None].to(tl.int64) * row_stride + columns[None, :])

    @triton.jit
    def store_tile(x, row, column, row_stride, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):  # type: ignore[no-untyped-def]
        """x[row : row + ROWS, column : column + COLUMNS] = tile, which has x's dtype already."""
        if TMA:
            x.store([row, column], tile)
        else:
            rows = row + tl.arange(0, ROWS)
            columns = column + tl.arange(0, COLUMNS)
            tl.store(x + rows[:, None].to(tl.int64) * row_stride + columns[None, :], tile)

    @triton.jit
    def product_tile(  # type: ignore[no-untyped-def]
        a, b, row, column, first_k, k_blocks, a_stride, b_stride,
        BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, TMA: tl.constexpr,
    ):  # fmt: skip
        """sum over k of a[row + i, k] * b[column + j, k], k from first_k over k_blocks * BK elements -> [BR, BC] of ACC (int32 or fp32)."""
        total = tl.zeros((BR, BC), ACC)
        if TMA:
            for block in range(k_blocks):
                a_tile = a.load([row, first_k + block * BK])
                b_tile = b.load([column, first_k + block * BK])
                total = tl.dot(a_tile, b_tile.T, total, out_dtype=ACC)
        else:
            k = first_k + tl.arange(0, BK)
            a_pointers = a + (row + tl.arange(0, BR))[:, None].to(tl.int64) * a_stride + k[None, :]
            b_pointers = b + (column + tl.arange(0, BC))[None, :].to(tl.int64) * b_stride + k[:, None]
            for _ in range(k_blocks):
                total = tl.dot(tl.load(a_pointers), tl.load(b_pointers), total, out_dtype=ACC)
                a_pointers += BK
                b_pointers += BK
        return total

    def operand(x: Tensor, block_rows: int, block_columns: int, tma: bool) -> Any:
        """A matrix as a kernel takes it: a TMA descriptor of blocks, or the tensor itself. x [R, K] has contiguous rows."""
        return TensorDescriptor.from_tensor(x, [block_rows, block_columns]) if tma else x

    def accumulator(code: torch.dtype) -> Any:
        """Triton dtype of a sum of products of codes."""
        return tl.int32 if code == torch.int8 else tl.float32


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (9, 0) for the interpreter (CPU tensors), so that tests run the path of the H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else FIRST_CAPABILITY_WITH_TMA


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a card; a small number for the interpreter, so that tests have several steps per program."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _INTERPRETED_PROCESSORS


def steps_per_program(most: int, tiles: int, programs_beside: int, device: torch.device) -> int:
    """How many of `tiles` a program takes one after the other, at most `most`: fewer where the card would not be full otherwise."""
    steps = most
    while steps > 1 and -(-tiles // steps) * programs_beside < _FULL_PROGRAMS * processors(device):
        steps //= 2
    return steps


def uses_tma(device: torch.device) -> bool:
    """Whether kernels on `device` take descriptors."""
    return capability(device) >= FIRST_CAPABILITY_WITH_TMA
