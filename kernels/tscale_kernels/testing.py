"""What tests of operations share: one error measure, shapes that break kernels, outputs that show what was not written.

Enters: results of two implementations. Leaves: nothing, or an AssertionError that carries the whole case.
"""

from __future__ import annotations

import torch
from torch import Tensor

AWKWARD_SHAPES: tuple[tuple[int, int], ...] = ((1, 8), (3, 8), (5, 128), (1, 1280), (7, 264), (33, 2560), (130, 24))
"""[rows, cols] with cols a multiple of 8: one row, one byte, rows that end inside a block, more rows than a block."""

_POISON_BYTE = 0x55


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error in fp64; the absolute one where `want` is zero."""
    difference = torch.linalg.vector_norm(got.double() - want.double()).item()
    size = torch.linalg.vector_norm(want.double()).item()
    return difference / size if size > 0 else difference


def assert_close(name: str, got: Tensor, want: Tensor, limit: float) -> None:
    """Shapes equal and relative error at most `limit`."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = relative_error(got, want)
    assert error <= limit, f"{name}: relative error {error:.3e} is above {limit:.1e}"


def assert_same_bits(name: str, got: Tensor, want: Tensor) -> None:
    """Equal dtype, shape and every bit; says where the first difference is."""
    assert got.dtype == want.dtype, f"{name}: {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    a, b = got.detach().cpu().contiguous().view(torch.uint8), want.detach().cpu().contiguous().view(torch.uint8)
    if not torch.equal(a, b):
        wrong = (a != b).reshape(-1).nonzero()
        first = int(wrong[0]) // got.element_size()
        raise AssertionError(
            f"{name}: {wrong.numel()} bytes differ, the first in element {first}: {got.reshape(-1)[first]} != {want.reshape(-1)[first]}"
        )


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An output buffer whose bytes are all 0x55: what a kernel forgets to write is seen."""
    return (
        torch.full((int(torch.tensor(shape).prod()) * dtype.itemsize,), _POISON_BYTE, dtype=torch.uint8, device=device)
        .view(dtype)
        .view(shape)
    )
