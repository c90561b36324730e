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

cpu_block_elements = 1 << 16
"""Elements per pass of the CPU reference: the signs of a block (int32) and the block itself take 512 KiB and stay in the L2 cache.
Measured on a server core: 0.4 to 0.6 ns per element, against 1.2 ns at a quarter of this block."""
triton_block_bytes = 32
"""Packed bytes (256 elements) that one Triton program handles per step of its row: a guess, not tuned on a card yet."""
