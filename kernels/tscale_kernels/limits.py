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
