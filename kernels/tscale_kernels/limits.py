"""Numbers of the kernels room, each with its reason."""

from __future__ import annotations

# -- the 16-bit step code: value = mantissa << exponent ----------------------------------------------------------------

step_mantissa_bits = 11
"""Significant bits of a step, as in fp16: the relative rounding error is at most 2**-11, far below the one-bit error itself."""
step_exponent_bits = 5
"""Together 16 bits per row on the wire."""
max_step = 1 << 24
"""Largest step in units. Every smaller integer, and this one, is exact in fp32, so a displacement can give up exactly what was added.
It is 64 times the root mean square of a weight at the recommended unit (2**-18 of it): a larger step is a diverged run."""

# -- blocks ------------------------------------------------------------------------------------------------------------

cpu_block_elements = 1 << 18
"""Elements per pass of the CPU reference. Its signs (int32, 1 MiB) are made and used up in the cache; smaller blocks pay for more calls.
Measured on a shared server core, ns per element: 2**14 1.3, 2**16 0.62, 2**18 0.47, 2**20 0.41."""
triton_block_bytes = 32
"""Packed bytes (256 elements) that one Triton program handles per step of its row. Measured on an H100, 2**28 elements, torch's fp32 add at
2.9 TB/s: rows of 1280 encode at 2.4 and apply at 2.8 TB/s (blocks of 256: 2.7 and 2.9); rows of 128 encode at 0.8 and apply at 1.7 TB/s
(blocks of 256: 0.4 and 1.2), so the small block is the better one for both."""

# -- deltas of 8 bits, of the largest values, of low rank --------------------------------------------------------------

delta_block = 128
"""Values that share a step in an 8-bit delta: 16 bits of step for 1024 bits of codes, as in the original's weight gradients."""
max_block_step = 1 << 17
"""Largest step of an 8-bit delta: 127 such steps stay below `max_step`."""
nibble_block = 64
"""Values that share a step in a 4-bit delta: 4.25 bits per value. Error against blocks of 128 (4.125 bits): 0.0116 instead of 0.0138 of
|d|^2 on Gaussian values, 0.020 instead of 0.026 on Laplacian ones; blocks of 32 cost 4.5 bits for 0.0094 and 0.015."""
max_nibble_step = 1 << 21
"""Largest step of a 4-bit delta: 7 such steps stay below `max_step`."""
delta_blocks_per_program = 16
"""Blocks (8-bit: 2048 values) that one Triton program encodes or adds: 16 values per thread of 4 warps. A guess, not yet measured."""
topk_stretch = 1 << 12
"""Values from which the k largest are picked. A position takes 12 bits; a program holds a stretch in registers. (SparseLoCo's size.)"""
topk_max_exponent = 24
"""2**24 is `max_step`."""
topk_picks_per_program = 256
"""Picks that one Triton program adds: a gather and a scatter, so small programs and many of them. A guess, not yet measured."""
max_rank = 128
"""Of a low-rank delta: sums of 128 products of int8 stay below 2**21, exact in fp32; above it 8-bit codes are hardly larger."""
lowrank_max_exponent = 9
"""Sums below 2**21 times 2**9 stay within int32."""
lowrank_min_exponent = -24
"""A sum below 2**21 shifted by more is zero; three bits to spare."""
lowrank_ridge = 1e-6
"""Part of its mean diagonal that is added to a Gram matrix: fp32 rounding of r <= 128 dependent columns stays below it."""
lowrank_fresh = 1e-2
"""Part of the start (columns of length 1) in the next one: too little to slow the iteration, enough to find a lost direction again."""
lowrank_tile = (64, 128)
"""Rows and columns that one Triton program of 8 warps adds to: 32 values per thread. A guess, not yet measured."""

# -- update in host memory ---------------------------------------------------------------------------------------------

host_block_elements = 1 << 17
"""Elements per pass of the torch version, whole blocks of 4096: weights, momentum, gradient and temporaries, 2.8 MiB, stay in the cache.
Measured on 2 shared server cores, ns per element of update and codes: 2**15 5.1, 2**17 2.2, 2**18 2.5 (C: 0.47, at the speed of memory)."""
