"""Group normalisation: enters x [..., C] with C a multiple of 128, leaves y of the same shape.

Rule (TScale): in every group of 128 consecutive channels y = x * sqrt(128 / sum x^2). No mean, no gain, no epsilon; a group of zeros stays
zero and passes no gradient. Backward, the exact derivative: dx = r * (dy - y * mean(y * dy)) with r = sqrt(128 / sum x^2).
"""

import math
from typing import Any

import torch

from tscale_fed.model.constants import GROUP_CHANNELS

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def normalise_ref(x: torch.Tensor) -> torch.Tensor:
    """The rule in autograd operations, for tests. The clamp keeps the unused branch of a zero group finite in the backward pass."""
    groups = x.unflatten(-1, (-1, GROUP_CHANNELS))
    mean_square = groups.square().mean(-1, keepdim=True)
    smallest = torch.finfo(x.dtype).tiny
    return torch.where(mean_square > 0, groups * mean_square.clamp_min(smallest).rsqrt(), 0.0).flatten(-2)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, GROUP_CHANNELS))
        precise = torch.float32 if x.dtype in _LOW_PRECISION else x.dtype
        length = torch.linalg.vector_norm(groups, dim=-1, keepdim=True, dtype=precise)
        multiplier = torch.where(length > 0, math.sqrt(GROUP_CHANNELS) / length, 0.0)
        y = (groups * multiplier).to(out_dtype)
        ctx.save_for_backward(y, multiplier)
        ctx.in_dtype = x.dtype
        return y.flatten(-2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        y, multiplier = ctx.saved_tensors
        grad = grads[0].unflatten(-1, (-1, GROUP_CHANNELS)).to(multiplier.dtype)
        along = torch.linalg.vecdot(y.to(multiplier.dtype), grad).unsqueeze(-1)
        out = torch.addcmul(grad, y, along, value=-1.0 / GROUP_CHANNELS).mul_(multiplier)
        return out.flatten(-2).to(ctx.in_dtype), None


def normalise(x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """`normalise_ref` with a hand-written backward pass that stores only y (in `out_dtype`, default x's) and one number per group."""
    return _Normalise.apply(x, out_dtype or x.dtype)
