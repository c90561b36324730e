"""Token weights of the balanced split: what a token's gradient is multiplied by, and its input divided by, before a weight gradient.

    size[t] = max(s[t], mean(s)),   weight[t] = 1 / sqrt(size[t]),   inverse[t] = sqrt(size[t])        s[t] = largest |gradient| of token t
dW = sum_t g[t] x[t] = sum_t (g[t] weight[t]) (x[t] inverse[t]) whatever the weights, so they change rounding alone: each side carries half
of the range of token scales, and one unit per channel is enough (spec/kernels.md 5.2). Tokens below the mean count as the mean: what they
add to a column is small, and their inputs need no room. If every s is 0 the weights are 1.

The mean is summed in a prescribed order (chunks of 8192 lane by lane, then halves onto halves), so all backends give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels import tiles
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.launch_table import launch

_LANES = 8192

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_token_weights(row_max: Tensor, *, weight: Tensor, inverse: Tensor) -> None:
    """See `token_weights`."""
    mean = _ref_mean(row_max)
    size = torch.where(row_max > mean, row_max, mean)
    root = size.double().sqrt().float()  # rounded once: torch's fp32 root on the CPU is not always the nearest
    weight.copy_(torch.where(size == 0, 1.0, root.reciprocal()))
    inverse.copy_(torch.where(size == 0, 1.0, root))


def _ref_mean(values: Tensor) -> Tensor:
    """[M] -> mean, in the prescribed order."""
    padded = torch.nn.functional.pad(values, (0, -values.numel() % _LANES)).view(-1, _LANES)
    lanes = padded[0]
    for chunk in padded[1:]:
        lanes = lanes + chunk
    while lanes.numel() > 1:
        lanes = lanes.view(2, -1)[0] + lanes.view(2, -1)[1]
    return lanes[0] / torch.full_like(lanes[0], values.numel())


# -- Triton ------------------------------------------------------------------------------------------------------------
# Every program takes the mean anew: that is cheaper than a second launch.

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def token_weights_kernel(row_max, weight, inverse, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        lane = tl.arange(0, 8192)
        total = tl.zeros((8192,), tl.float32)
        for first in range(0, count, 8192):
            total += tl.load(row_max + first + lane, mask=first + lane < count, other=0.0)
        for step in tl.static_range(13):
            total = tl.sum(tl.reshape(total, (2, 4096 >> step)), axis=0)
        mean = tl.div_rn(tl.sum(total, axis=0), count.to(tl.float32))
        token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(row_max + token, mask=token < count, other=0.0)
        size = tl.where(value > mean, value, mean)
        root = tl.sqrt_rn(size)
        tl.store(weight + token, tl.where(size == 0, 1.0, tl.div_rn(1.0, root)), mask=token < count)
        tl.store(inverse + token, tl.where(size == 0, 1.0, root), mask=token < count)


def _launch(row_max: Tensor, weight: Tensor, inverse: Tensor) -> None:
    count = row_max.numel()
    config = launch("token_weights", tiles.capability(row_max.device))
    token_weights_kernel[(triton.cdiv(count, config["BLOCK"]),)](row_max, weight, inverse, count, enable_fp_fusion=False, **config)


# -- run ---------------------------------------------------------------------------------------------------------------


def token_weights(row_max: Tensor, *, weight: Tensor, inverse: Tensor, backend: BackendName | None = None) -> None:
    """weight and inverse of every token. All fp32 [M]; row_max >= 0 (a NaN makes all weights NaN)."""
    if choose(row_max.device, backend).name == "triton":
        _launch(row_max, weight, inverse)
        return
    ref_token_weights(row_max, weight=weight, inverse=inverse)
