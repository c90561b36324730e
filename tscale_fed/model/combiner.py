"""Combiner input: enters gate G and attention result O, leaves the vector that the combiner matrix reads.

Rule (TScale): for head h, replica r in 0..3 and channel z: kv[h, r, z] = G[h, z XOR r] * O[h, z], flattened as h*512 + r*128 + z. XOR
with 0..3 permutes channels inside aligned groups of 4, so the four replicas hold all 16 products of each group of 4 gates and 4 results.

`pair_products` computes the same numbers in an order that vector units like: channel z = 4m + j is kept at j*32 + m ("blocked"), and the
output is indexed [h, i, j, m] = G[h, i, m] * O[h, j, m], a plain outer product. Gate and value rows and combiner columns are put into
that order by index (weights are small beside activations). Measured on one CPU core, 2048 tokens, 1 head, forward and backward: gathering
by XOR 6.1 ms, outer product of groups of 4 in place 7.2 ms, blocked 1.3 ms plus 0.3 ms for the three weight permutations.
"""

from typing import Any

import torch

from tscale_fed.model.constants import COMBINER_REPLICAS, HEAD_CHANNELS

_BLOCK = HEAD_CHANNELS // COMBINER_REPLICAS


def combine_ref(gate: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """The rule as it stands. gate, attended [B, T, H, 128] in natural channel order -> [B, T, 4A]."""
    channel = torch.arange(HEAD_CHANNELS, device=gate.device)
    replicas = [gate[..., channel ^ r] * attended for r in range(COMBINER_REPLICAS)]
    return torch.stack(replicas, dim=-2).flatten(-3)


def blocked_channels(heads: int) -> torch.Tensor:
    """[A] int64: row of the natural order that stands at each place of the blocked order."""
    natural = torch.arange(heads * HEAD_CHANNELS).view(heads, _BLOCK, COMBINER_REPLICAS)
    return natural.transpose(1, 2).flatten()


def blocked_columns(heads: int) -> torch.Tensor:
    """[4A] int64: column of the combiner matrix that multiplies each product [h, i, j, m]: replica i XOR j, channel 4m + j."""
    natural = torch.arange(COMBINER_REPLICAS * heads * HEAD_CHANNELS).view(heads, COMBINER_REPLICAS, _BLOCK, COMBINER_REPLICAS)
    i = torch.arange(COMBINER_REPLICAS)[:, None].expand(-1, COMBINER_REPLICAS)
    j = i.T
    return natural.transpose(-1, -2)[:, i ^ j, j].flatten()


class _PairProducts(torch.autograd.Function):
    """Stores G and O only (autograd would keep expanded copies and sum four-fold gradients)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, attended)
        g = gate.unflatten(-1, (COMBINER_REPLICAS, 1, _BLOCK))
        o = attended.unflatten(-1, (1, COMBINER_REPLICAS, _BLOCK))
        return (g * o).flatten(-4)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, o = (x.unflatten(-1, (COMBINER_REPLICAS, _BLOCK)) for x in ctx.saved_tensors)
        grad = grads[0].unflatten(-1, (-1, COMBINER_REPLICAS, COMBINER_REPLICAS, _BLOCK))
        grad_g = grad[..., :, 0, :] * o[..., :1, :]
        grad_o = grad[..., 0, :, :] * g[..., :1, :]
        for k in range(1, COMBINER_REPLICAS):
            grad_g.addcmul_(grad[..., :, k, :], o[..., k : k + 1, :])
            grad_o.addcmul_(grad[..., k, :, :], g[..., k : k + 1, :])
        return grad_g.flatten(-2), grad_o.flatten(-2)


def pair_products(gate: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """gate, attended [B, T, H, 128] in blocked channel order -> [B, T, 4A] in the order of `blocked_columns`."""
    return _PairProducts.apply(gate, attended)
