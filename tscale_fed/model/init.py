"""Start weights: enters a shape and a seed, leaves one flat vector in canonical order.

Rule (TScale): embedding N(0, 1) with zero noise rows; final, query, key, gate, value and feed-forward up N(0, 0.5^2); combiner and
feed-forward down zero, so that every layer starts as an exact no-op. Nothing depends on depth or fan-in: products are divided by
sqrt(inputs) at run time.
"""

import torch

from tscale_fed.model.constants import INIT_RMS
from tscale_fed.model.shape import ModelShape

_STARTS_AT_ZERO = ("combiner", "ffn_down")


def initialise(shape: ModelShape, seed: int) -> torch.Tensor:
    """Flat fp32 start weights on the CPU, length `shape.trained_parameters`; equal seeds give equal weights."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.zeros(shape.trained_parameters)
    start = 0
    for name, rows, columns in shape.tensors():
        matrix = flat[start : start + rows * columns].view(rows, columns)
        start += rows * columns
        if name == "embedding":
            matrix[shape.noise_rows :].normal_(0.0, 1.0, generator=generator)
        elif not name.endswith(_STARTS_AT_ZERO):
            matrix.normal_(0.0, INIT_RMS, generator=generator)
    return flat
