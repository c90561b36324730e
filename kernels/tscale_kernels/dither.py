"""Dither: noise in [0, 1) from a counter hash, the same bits in torch, in Triton and in its interpreter.

    noise(i, seed) = (hash(i XOR seed) >> 8) * 2**-24,   hash = a Weyl multiplication and the lowbias32 finaliser (Wellons 2018)
A dithered rounding floor(v + noise) has mean v. `i` is the position of the element in its matrix (row * columns + column, below 2**31);
every use within a step has its own salt, and `mixed_seed` spreads (step seed, salt) over 32 bits, so no two matrices share a noise field.
Never `tl.rand`: its generator spills registers (spec/kernels.md 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.dispatch import has_triton

_MASK = 0xFFFFFFFF
_SALT_STEP = 0x9E3779B1
"""2**32 divided by the golden ratio, odd: consecutive salts land far apart."""


def ref_hash(values: Tensor) -> Tensor:
    """int64 in 0..2**32-1 -> hashed int64 in the same range."""
    h = (values * 0x9E3779B1) & _MASK
    h = h ^ (h >> 16)
    h = (h * 0x21F0AAAD) & _MASK
    h = h ^ (h >> 15)
    h = (h * 0x735A2D97) & _MASK
    return h ^ (h >> 15)


def mixed_seed(seed: Tensor, salt: int) -> Tensor:
    """int32 [1] step seed and a salt -> int64 [1] in 0..2**32-1."""
    return ref_hash((seed.to(torch.int64) & _MASK) ^ ((salt * _SALT_STEP) & _MASK))


def ref_noise(rows: int, columns: int, seed: Tensor, salt: int) -> Tensor:
    """fp32 [rows, columns] in [0, 1) on the seed's device; seed int32 [1]."""
    index = torch.arange(rows * columns, dtype=torch.int64, device=seed.device).view(rows, columns)
    return (ref_hash(index ^ mixed_seed(seed, salt)) >> 8).float() * 2.0**-24


if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def hash_u32(values):  # type: ignore[no-untyped-def]
        """`ref_hash` of uint32."""
        h = values * 0x9E3779B1
        h = h ^ (h >> 16)
        h = h * 0x21F0AAAD
        h = h ^ (h >> 15)
        h = h * 0x735A2D97
        return h ^ (h >> 15)

    @triton.jit
    def load_seed(seed, SALT: tl.constexpr):  # type: ignore[no-untyped-def]
        """`mixed_seed` from a pointer to int32, as uint32. SALT is an int below 2**32."""
        return hash_u32(tl.load(seed).to(tl.uint32) ^ tl.full((), (SALT * 0x9E3779B1) & 0xFFFFFFFF, tl.uint32))

    @triton.jit
    def noise(index, mixed):  # type: ignore[no-untyped-def]
        """`ref_noise` of int32 positions; `mixed` from `load_seed`."""
        return (hash_u32(index.to(tl.uint32) ^ mixed) >> 8).to(tl.float32) * 5.9604644775390625e-08
