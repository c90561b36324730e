"""One layer: enters the state x [B, T, E], leaves the state after attention and feed-forward.

Rule (TScale), `lin(x, W) = x W^T / sqrt(inputs)`, `norm` = group normalisation, `rope` = rotary embedding:
    n = norm(x);  q = rope(norm(lin(n, query)));  k = rope(lin(n, key));  g = norm(lin(n, gate));  v = norm(lin(n, value))
    x = x + lin(combine(g, attention(q, k, v)), combiner)
    x = x + lin(relu(norm(lin(norm(x), ffn_up))), ffn_down)
The state stays in its own dtype; products and what enters them are in `compute` (the same, or bf16). No branch depends on data.
"""

from typing import NamedTuple

import torch

from tscale_fed.model.attention import attend
from tscale_fed.model.combiner import pair_products
from tscale_fed.model.constants import HEAD_CHANNELS
from tscale_fed.model.normalise import normalise
from tscale_fed.model.rotary import rotate


class LayerWeights(NamedTuple):
    """The seven matrices of a layer, [outputs, inputs] each, in canonical order."""

    query: torch.Tensor
    key: torch.Tensor
    gate: torch.Tensor
    value: torch.Tensor
    combiner: torch.Tensor
    ffn_up: torch.Tensor
    ffn_down: torch.Tensor


class LayerPlan(NamedTuple):
    """Everything else that a layer reads: its kind, and what depends on the batch's sizes and documents but not on weights."""

    kind: tuple[int, float]
    """(attention width in tokens, alibi slope)"""
    bias: torch.Tensor | None
    same_document: torch.Tensor | None
    cosine: torch.Tensor
    sine: torch.Tensor
    channels: torch.Tensor
    """`combiner.blocked_channels`"""
    columns: torch.Tensor
    """`combiner.blocked_columns`"""


def linear(x: torch.Tensor, weight: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """x W^T / sqrt(inputs); the factor goes to the weight, which is smaller than x."""
    return x @ (weight * weight.shape[1] ** -0.5).to(compute).T


def attention_step(x: torch.Tensor, weights: LayerWeights, plan: LayerPlan, compute: torch.dtype) -> torch.Tensor:
    """What attention adds to the state. Gate and value channels are in blocked order (`combiner`)."""
    gate_rows, value_rows = (matrix.index_select(0, plan.channels) for matrix in (weights.gate, weights.value))
    joined = torch.cat((weights.query, gate_rows, value_rows, weights.key))
    projected = linear(normalise(x, compute), joined, compute).unflatten(-1, (4, -1, HEAD_CHANNELS))
    to_normalise, key = projected.split((3, 1), dim=2)
    query, gate, value = normalise(to_normalise).unbind(2)
    query, key = rotate(query, plan.cosine, plan.sine), rotate(key.squeeze(2), plan.cosine, plan.sine)
    attended = attend(query, key, value, plan.kind, plan.bias, plan.same_document)
    return linear(pair_products(gate, attended), weights.combiner.index_select(1, plan.columns), compute)


def feed_forward_step(x: torch.Tensor, weights: LayerWeights, compute: torch.dtype) -> torch.Tensor:
    """What the feed-forward step adds to the state."""
    hidden = normalise(linear(normalise(x, compute), weights.ffn_up, compute))
    return linear(torch.relu(hidden), weights.ffn_down, compute)


def layer(x: torch.Tensor, weights: LayerWeights, plan: LayerPlan, compute: torch.dtype) -> torch.Tensor:
    """State [B, T, E] -> state [B, T, E]."""
    x = x + attention_step(x, weights, plan, compute)
    return x + feed_forward_step(x, weights, compute)
