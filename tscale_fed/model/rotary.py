"""Rotary position embedding: enters [B, T, H, 128] queries or keys, leaves them turned by their position in the fragment.

Rule (TScale): inside a head, channels form two blocks of 64; channel b + k pairs with b + k + 32 for k < 32, block 0 uses frequencies
0..31, block 1 uses 32..63, frequency i = theta^(-2i/128), theta = 500000. (Rotary embedding: Su et al. 2021; the blocks are TScale's
pairing.) Positions count from the start of the fragment; only differences of positions matter.
"""

from typing import Any

import torch

from tscale_fed.model.constants import HEAD_CHANNELS, ROTARY_BLOCK_CHANNELS, ROTARY_THETA

_BLOCKS = HEAD_CHANNELS // ROTARY_BLOCK_CHANNELS
_PAIRS = ROTARY_BLOCK_CHANNELS // 2


def rotary_table(tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosine, sine) of every angle, each [T, 1, 2 blocks, 32]. Computed in fp64: an fp32 angle is off by 1e-3 at token 20 000."""
    index = torch.arange(HEAD_CHANNELS // 2, device="cpu", dtype=torch.float64)
    frequency = ROTARY_THETA ** (-2.0 * index / HEAD_CHANNELS)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
    angle = angle.view(tokens, 1, _BLOCKS, _PAIRS)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x.unflatten(-1, (_BLOCKS, 2, _PAIRS)).to(cosine.dtype).unbind(-2)
    turned = torch.empty(*first.shape[:-1], 2, _PAIRS, device=x.device, dtype=cosine.dtype)
    turned_first, turned_second = turned.unbind(-2)
    turned_first.copy_(first * cosine).addcmul_(second, sine, value=-1.0)
    turned_second.copy_(second * cosine).addcmul_(first, sine)
    return turned.flatten(-3).to(x.dtype)


class _Rotary(torch.autograd.Function):
    """A rotation's backward pass is the opposite rotation; nothing but the table is stored."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotate(x, cosine, sine)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotate(grads[0], cosine, -sine), None, None


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn x [B, T, H, 128] by the table of `rotary_table`."""
    return _Rotary.apply(x, cosine, sine)
