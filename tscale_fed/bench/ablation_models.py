"""Two architectures for the ablation, in one form: lists of stacked weights and a function from tokens to logits.

    tscale   the block of this project: strict past with a sink, widths 1 / 64 / w, gated combiner, thin feed-forward, everything normalised
    plain    a modern transformer block: RMSNorm with gains, causal attention that sees the token itself, heads of 64, rotary positions,
             SwiGLU; as many weights as the other, in fewer layers of the same width
    wide     the same block, half as many layers, wider

Both have an untied final layer, the same fixed output bias and bf16 products over fp32 weights. `scaled` weights are divided by
sqrt(inputs) where they are used, which the TScale rule needs: its steps have an absolute size. At the start both forms compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tscale_fed.bench.compiled_layer import CompiledWeights, compiled_layer, make_attend, unit_rms
from tscale_fed.model.constants import INIT_RMS
from tscale_fed.model.rotary import rotary_table
from tscale_fed.model.shape import ModelShape

COMPUTE = torch.bfloat16
PLAIN_HEAD_CHANNELS = 64
PLAIN_THETA = 10_000.0
PLAIN_INIT = 3**-0.5
"""Standard deviation of start weights times sqrt(inputs): that of torch's linear layers."""
_HIDDEN_MULTIPLE = 16
Kind = Literal["matrix", "rows", "gain"]
"""matrix: hidden matrices; rows: embedding and final layer; gain: vectors."""


@dataclass(frozen=True, slots=True)
class Stack:
    """`parts` tensors [rows, columns] of one kind."""

    name: str
    parts: int
    rows: int
    columns: int
    kind: Kind
    deviation: float
    mean: float = 0.0

    @property
    def size(self) -> int:
        return self.parts * self.rows * self.columns


class Architecture(Protocol):
    """A model without its weights."""

    stacks: list[Stack]

    def state(self, weights: Sequence[Sequence[Tensor]], text: Tensor, layer: Callable[..., Tensor]) -> Tensor:
        """Normalised final state [B, T, E]; weights: per stack, one fp32 tensor [rows, columns] per part."""
        ...

    @property
    def layer(self) -> Callable[..., Tensor]:
        """What is compiled."""
        ...


def scaled_to(weight: Tensor, scaled: bool) -> Tensor:
    """Weight as products read it."""
    return (weight * weight.shape[-1] ** -0.5 if scaled else weight).to(COMPUTE)


def look_up(embedding: Tensor, text: Tensor) -> Tensor:
    """Rows of text [B, T]: the gradient of index_select can be part of a CUDA graph."""
    return embedding.index_select(0, text.flatten()).unflatten(0, text.shape)


# -- tscale ------------------------------------------------------------------------------------------------------------


def tscale_layer(
    x: Tensor, projection: Sequence[Tensor], combiner: Tensor, up: Tensor, down: Tensor, cosine: Tensor, sine: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """`compiled_layer` with fp32 weights."""
    joined = torch.stack([scaled_to(each, True) for each in projection])
    return compiled_layer(x, CompiledWeights(joined, *(scaled_to(each, True) for each in (combiner, up, down))), cosine, sine, attend)


class TScale:
    """See the module."""

    def __init__(self, shape: ModelShape, tokens: int, padded_vocab: int, device: torch.device) -> None:
        width, inner, hidden, layers = shape.width, shape.heads_width, shape.ffn_width, len(shape.layers())
        self.stacks = [
            Stack("projection", 4 * layers, inner, width, "matrix", INIT_RMS),
            Stack("combiner", layers, width, 4 * inner, "matrix", 0.0),
            Stack("up", layers, hidden, width, "matrix", INIT_RMS),
            Stack("down", layers, width, hidden, "matrix", 0.0),
            Stack("embedding", 1, shape.vocab, width, "rows", 1.0),
            Stack("final", 1, padded_vocab, width, "rows", INIT_RMS),
        ]
        local: Literal["flex", "blocks"] = "flex" if device.type == "cuda" else "blocks"
        table = rotary_table(tokens, device, torch.float32)
        self._extras = [(*table, make_attend(kind, tokens, device, local)) for kind in shape.layers()]
        self.scaled = True

    @property
    def layer(self) -> Callable[..., Tensor]:
        return tscale_layer

    def state(self, weights: Sequence[Sequence[Tensor]], text: Tensor, layer: Callable[..., Tensor]) -> Tensor:
        projection, combiner, up, down, embedding, _ = weights
        x = look_up(embedding[0], text)
        for index, extras in enumerate(self._extras):
            x = layer(x, projection[4 * index : 4 * index + 4], combiner[index], up[index], down[index], *extras)
        return unit_rms(x, COMPUTE)


# -- plain -------------------------------------------------------------------------------------------------------------


def root_mean_square(x: Tensor) -> Tensor:
    """RMSNorm over all channels, fp32."""
    return functional.rms_norm(x.float(), x.shape[-1:], eps=1e-6)


def plain_layer(
    x: Tensor, qkv: Sequence[Tensor], out: Tensor, up_gate: Sequence[Tensor], down: Tensor, gains: Sequence[Tensor],
    cosine: Tensor, sine: Tensor, scaled: bool,
) -> Tensor:  # fmt: skip
    """State [B, T, E] -> state [B, T, E]."""
    n = (root_mean_square(x) * gains[0][0]).to(COMPUTE)
    query, key, value = ((n @ scaled_to(each, scaled).T).unflatten(-1, (-1, PLAIN_HEAD_CHANNELS)) for each in qkv)
    query, key = (_turn(each.float(), cosine, sine).to(COMPUTE) for each in (query, key))
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
    x = x + attended @ scaled_to(out, scaled).T
    n = (root_mean_square(x) * gains[1][0]).to(COMPUTE)
    up, gate = (n @ scaled_to(each, scaled).T for each in up_gate)
    return x + (functional.silu(gate) * up) @ scaled_to(down, scaled).T


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class Plain:
    """See the module. `scaled`: for the TScale rule."""

    def __init__(
        self, width: int, layers: int, hidden: int, vocab: int, padded_vocab: int, tokens: int, device: torch.device, scaled: bool
    ) -> None:
        def deviation(inputs: int) -> float:
            return PLAIN_INIT if scaled else PLAIN_INIT * inputs**-0.5

        self.stacks = [
            Stack("qkv", 3 * layers, width, width, "matrix", deviation(width)),
            Stack("out", layers, width, width, "matrix", 0.0),
            Stack("up_gate", 2 * layers, hidden, width, "matrix", deviation(width)),
            Stack("down", layers, width, hidden, "matrix", 0.0),
            Stack("gains", 2 * layers + 1, 1, width, "gain", 0.0, 1.0),
            Stack("embedding", 1, vocab, width, "rows", 1.0),
            Stack("final", 1, padded_vocab, width, "rows", deviation(width)),
        ]
        frequency = PLAIN_THETA ** (-torch.arange(0, 1, 2 / PLAIN_HEAD_CHANNELS, dtype=torch.float64))
        angle = (torch.arange(tokens, dtype=torch.float64)[:, None] * frequency).unsqueeze(1)
        self._table = (angle.cos().float().to(device), angle.sin().float().to(device))
        self._layers = layers
        self.scaled = scaled

    @property
    def layer(self) -> Callable[..., Tensor]:
        return plain_layer

    def state(self, weights: Sequence[Sequence[Tensor]], text: Tensor, layer: Callable[..., Tensor]) -> Tensor:
        qkv, out, up_gate, down, gains, embedding, _ = weights
        x = look_up(embedding[0], text)
        for i in range(self._layers):
            pairs = (up_gate[2 * i : 2 * i + 2], down[i], gains[2 * i : 2 * i + 2])
            x = layer(x, qkv[3 * i : 3 * i + 3], out[i], *pairs, *self._table, self.scaled)
        return (root_mean_square(x) * gains[-1][0]).to(COMPUTE)


def make_architecture(name: str, shape: ModelShape, tokens: int, padded_vocab: int, device: torch.device, scaled: bool) -> TScale | Plain:
    """`name` tscale, plain or wide; the plain ones get as many weights in their layers as `shape` has, within a few thousandths."""
    if name == "tscale":
        return TScale(shape, tokens, padded_vocab, device)
    wanted = sum(rows * columns for matrix, rows, columns in shape.tensors() if matrix.startswith("layers."))
    width = shape.width if name == "plain" else wide_width(shape.width)
    layers = max(1, round(wanted / (12 * width * width)))
    hidden = round((wanted / layers - 4 * width * width) / (3 * width) / _HIDDEN_MULTIPLE) * _HIDDEN_MULTIPLE
    return Plain(width, layers, hidden, shape.vocab, padded_vocab, tokens, device, scaled)


def wide_width(width: int) -> int:
    """About sqrt(2) times as wide, so that half as many layers have the same weights."""
    return math.ceil(width * math.sqrt(2.0) / PLAIN_HEAD_CHANNELS) * PLAIN_HEAD_CHANNELS
