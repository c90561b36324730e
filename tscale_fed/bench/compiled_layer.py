"""The model's layer as somebody would write it for torch.compile: what the engine's speed is compared with.

Enters: state x [B, T, E] in fp32 and a layer's weights, already in the dtype of the products and divided by sqrt(inputs). Leaves: the state
after attention and feed-forward. The mathematics is that of `tscale_fed.model`; rows of gate and value and columns of the combiner are in
blocked order (`model/combiner.py`), so that the combiner's products are a plain outer product.

Attention to the strict past with a zero sink is plain causal attention over keys and values moved by one token, with a zero key and a zero
value in front: token t then sees the sink and tokens 0 to t - 1. Three ways, by static sizes only:
    previous   width 1, elementwise
    causal     the window reaches over the whole fragment: scaled_dot_product_attention, cuDNN or flash
    local      narrower: `flex` (FlexAttention, CUDA only) or `blocks` (a block of queries times its own and the previous block of keys)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tscale_fed.model.attention import LOGIT_SCALE
from tscale_fed.model.constants import COMBINER_REPLICAS, GROUP_CHANNELS, HEAD_CHANNELS, PREVIOUS_WIDTH

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key, value [B, T, H, 128] -> attended values of the same shape."""
LocalWay = Literal["flex", "blocks"]

_BLOCK = HEAD_CHANNELS // COMBINER_REPLICAS


class CompiledWeights(NamedTuple):
    """Weights of a layer, in the dtype of the products, divided by sqrt(inputs)."""

    projection: Tensor
    """[4, A, E]: query, key, gate, value."""
    combiner: Tensor
    """[E, 4A]."""
    ffn_up: Tensor
    ffn_down: Tensor


def unit_rms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Groups of 128 channels at an RMS of 1; a group of zeros stays zero."""
    groups = x.unflatten(-1, (-1, GROUP_CHANNELS)).float()
    smallest = torch.finfo(torch.float32).tiny
    return (groups * groups.square().mean(-1, keepdim=True).clamp_min(smallest).rsqrt()).flatten(-2).to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn x [B, T, H, 128] in fp32 by the table [T, 1, 2, 32] of `model.rotary`."""
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    return torch.stack((first * cosine - second * sine, second * cosine + first * sine), dim=-2).flatten(-3)


def compiled_layer(x: Tensor, weights: CompiledWeights, cosine: Tensor, sine: Tensor, attend: Attend) -> Tensor:
    """State [B, T, E] -> state [B, T, E]."""
    compute = weights.projection.dtype
    projected = unit_rms(x, compute) @ weights.projection.flatten(0, 1).T
    query, key, gate, value = projected.unflatten(-1, (4, -1, HEAD_CHANNELS)).unbind(2)
    query = rotate(unit_rms(query, torch.float32), cosine, sine).to(compute)
    key = rotate(key.float(), cosine, sine).to(compute)
    attended = attend(query, key, unit_rms(value, compute))
    gate = unit_rms(gate, compute).unflatten(-1, (COMBINER_REPLICAS, 1, _BLOCK))
    products = (gate * attended.unflatten(-1, (1, COMBINER_REPLICAS, _BLOCK))).flatten(-4)
    x = x + products @ weights.combiner.T
    hidden = torch.relu(unit_rms(unit_rms(x, compute) @ weights.ffn_up.T, compute))
    return x + hidden @ weights.ffn_down.T


@cache
def make_attend(kind: tuple[int, float], tokens: int, device: torch.device, local: LocalWay) -> Attend:
    """Attention of a layer of `kind` = (width, slope) over fragments of `tokens` tokens, to be traced by torch.compile.

    Kept: models of equal sizes share it, and so what was compiled for it.
    """
    width, slope = kind
    if width == PREVIOUS_WIDTH:
        return attend_previous
    if is_causal(kind, tokens):
        return attend_causal
    return make_flex(width, slope, tokens, device) if local == "flex" else make_blocks(width, slope, tokens, device)


def is_causal(kind: tuple[int, float], tokens: int) -> bool:
    """Whether the window hides nothing of a fragment."""
    return kind[0] >= tokens - 1 and kind[1] == 0.0


def _moved(x: Tensor) -> Tensor:
    """One token later, zeros in front."""
    return functional.pad(x[:, :-1], (0, 0, 0, 0, 1, 0))


def attend_previous(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Width 1: a sigmoid gate on the previous value, nothing for the first token."""
    gate = torch.sigmoid((query.float() * _moved(key).float()).sum(-1, keepdim=True) * LOGIT_SCALE)
    return gate.to(value.dtype) * _moved(value)


def attend_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """See the module."""
    q, k, v = (x.transpose(1, 2) for x in (query, _moved(key), _moved(value)))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=LOGIT_SCALE).transpose(1, 2)


def make_flex(width: int, slope: float, tokens: int, device: torch.device) -> Attend:
    """FlexAttention over the moved keys; slot 0 is the sink, which every token sees without penalty."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    penalty = slope * math.log(2.0)

    def visible(b: Tensor, h: Tensor, t: Tensor, slot: Tensor) -> Tensor:
        return (slot == 0) | ((slot <= t) & (t + 1 - slot <= width))

    def score(logit: Tensor, b: Tensor, h: Tensor, t: Tensor, slot: Tensor) -> Tensor:
        return torch.where(slot == 0, 0.0, logit - penalty * (t + 1 - slot))

    mask = create_block_mask(visible, None, None, tokens, tokens, device=str(device))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, _moved(key), _moved(value)))
        out = flex_attention(q, k, v, score_mod=score, block_mask=mask, scale=LOGIT_SCALE)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return attend


def make_blocks(width: int, slope: float, tokens: int, device: torch.device) -> Attend:
    """Blocks of `width` queries against two blocks of keys; the sink is a 1 in the softmax' denominator."""
    blocks = -(-tokens // width)
    behind = (0, 0, 0, 0, 0, blocks * width - tokens)
    bias = _blocks_bias(width, slope, blocks, device)

    def neighbours(x: Tensor) -> Tensor:
        own = functional.pad(x, behind).unflatten(1, (blocks, width))
        before = functional.pad(own[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat((before, own), dim=2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries = functional.pad(query, behind).unflatten(1, (blocks, width))
        logits = torch.einsum("bnqhd,bnshd->bnhqs", queries, neighbours(key)).float() * LOGIT_SCALE + bias
        peak = logits.amax(-1, keepdim=True).clamp_min(0.0)  # 0 is the sink's logit
        weights = (logits - peak).exp()
        weights = weights / (weights.sum(-1, keepdim=True) + (-peak).exp())
        out = torch.einsum("bnhqs,bnshd->bnqhd", weights.to(value.dtype), neighbours(value))
        return out.flatten(1, 2)[:, : query.shape[1]]

    return attend


def _blocks_bias(width: int, slope: float, blocks: int, device: torch.device) -> Tensor:
    """fp32 [blocks, 1, width, 2 width]: alibi where a query sees a key, -inf elsewhere (the block before the first one does not exist)."""
    distance = torch.arange(width)[:, None] + width - torch.arange(2 * width)[None, :]
    bias = torch.where((distance >= 1) & (distance <= width), -slope * math.log(2.0) * distance, -math.inf)
    bias = bias.expand(blocks, 1, width, 2 * width).clone()
    bias[0, :, :, :width] = -math.inf
    return bias.float().to(device)
