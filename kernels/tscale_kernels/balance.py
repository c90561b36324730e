"""Token weights of the balanced split: what a token's gradient is multiplied by, and its input divided by, before a weight gradient.

    size[t] = max(s[t], mean(s)),   weight[t] = 1 / sqrt(size[t]),   inverse[t] = sqrt(size[t])        s[t] = largest |gradient| of token t
dW = sum_t g[t] x[t] = sum_t (g[t] weight[t]) (x[t] inverse[t]) whatever the weights, so they change rounding alone: each side carries half
of the range of token scales, and one unit per channel is enough (spec/kernels.md 5.2). Tokens below the mean count as the mean: what they
add to a column is small, and their inputs need no room. If every s is 0 the weights are 1.

The mean is summed in a prescribed order (chunks of 1024 lane by lane, then halves onto halves), so all backends give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.dispatch import BackendName, choose

_LANES = 1024

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_token_weights(row_max: Tensor, *, weight: Tensor, inverse: Tensor) -> None:
    """See `token_weights`."""
    mean = _ref_mean(row_max)
    size = torch.where(row_max > mean, row_max, mean)
    root = size.sqrt()
    weight.copy_(torch.where(size == 0, 1.0, 1.0 / root))
    inverse.copy_(torch.where(size == 0, 1.0, root))


def _ref_mean(values: Tensor) -> Tensor:
    """[M] -> mean, in the prescribed order."""
    padded = torch.nn.functional.pad(values, (0, -values.numel() % _LANES)).view(-1, _LANES)
    lanes = padded[0]
    for chunk in padded[1:]:
        lanes = lanes + chunk
    while lanes.numel() > 1:
        lanes = lanes.view(2, -1)[0] + lanes.view(2, -1)[1]
    return lanes[0] / values.numel()


# -- run ---------------------------------------------------------------------------------------------------------------


def token_weights(row_max: Tensor, *, weight: Tensor, inverse: Tensor, backend: BackendName | None = None) -> None:
    """weight and inverse of every token. All fp32 [M]; row_max >= 0 (a NaN makes all weights NaN)."""
    choose(row_max.device, backend)
    ref_token_weights(row_max, weight=weight, inverse=inverse)
