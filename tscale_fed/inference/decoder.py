"""Decoding: enters new tokens of some sequences, leaves the logits of what follows; keys and values stay in the cache.

The arithmetic is that of model/layer.py and model/attention.py for the new positions alone. `step` takes one token of each of several
sequences, `prefill` many tokens of one; both may follow each other in any order and give what one forward pass over the whole text gives
(tests/fed/test_inference.py). A token that starts a document is seen by what follows it, and sees nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tscale_fed.inference import limits
from tscale_fed.inference.cache import SINK, Cache
from tscale_fed.inference.weights import DecodingWeights, LayerMatrices
from tscale_fed.model.attention import LOGIT_SCALE
from tscale_fed.model.constants import COMBINER_REPLICAS, GROUP_CHANNELS, HEAD_CHANNELS, ROTARY_BLOCK_CHANNELS, ROTARY_THETA

_BLOCKS = HEAD_CHANNELS // ROTARY_BLOCK_CHANNELS
_PAIRS = ROTARY_BLOCK_CHANNELS // 2
_QUARTER = HEAD_CHANNELS // COMBINER_REPLICAS
_LEAST_NORM = 1e-20
"""Below every norm that matters: a group of zeros stays zero."""


class Decoder:
    """A model with a cache for `slots` sequences. One caller at a time."""

    def __init__(self, weights: DecodingWeights, slots: int, doc_start_token: int | None) -> None:
        self.weights = weights
        self.cache = Cache(weights.shape, slots, weights.device, weights.compute)
        self._doc_start_token = doc_start_token
        index = torch.arange(HEAD_CHANNELS // 2, dtype=torch.float64)
        # Angles are taken in double precision: in single they are off by 1e-3 at token 20 000.
        self._frequency = (ROTARY_THETA ** (-2.0 * index / HEAD_CHANNELS)).to(weights.device)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """One more token for each of the sequences in slots 0..S - 1: int64 [S]. Returns fp32 logits [S, V] of the next ones."""
        state = self._advance(slice(0, len(tokens)), tokens.to(self.weights.device)[:, None])
        return self._logits(state[:, -1])

    @torch.no_grad()
    def prefill(self, slot: int, tokens: Tensor, every: bool = False) -> Tensor:
        """More tokens of one sequence: int64 [n], n at least 1. Returns fp32 logits [1, V] after the last, or [n, V] after `every` one."""
        found = []
        for part in tokens.to(self.weights.device).split(limits.prefill_tokens):
            state = self._advance(slice(slot, slot + 1), part[None])[0]
            if every:
                found.append(self._logits(state))
        return torch.cat(found) if every else self._logits(state[-1:])

    # -- inside a step -----------------------------------------------------------------------------------------------

    def _advance(self, rows: slice, tokens: Tensor) -> Tensor:
        """Normalised final states [S, n, E] of new tokens [S, n]."""
        cache, weights = self.cache, self.weights
        count = tokens.shape[1]
        positions = cache.length[rows, None] + torch.arange(count, device=tokens.device)
        start = cache.start[rows, None]
        if self._doc_start_token is not None:
            begins = torch.where(tokens == self._doc_start_token, positions, start)
            start = begins.cummax(1).values
        visible = positions - start
        angle = positions[..., None].to(torch.float64) * self._frequency
        turn = tuple(part.view(*positions.shape, 1, _BLOCKS, 1, _PAIRS).to(torch.float32) for part in (angle.cos(), angle.sin()))
        masks: dict[tuple[int, float], Tensor] = {}
        x = weights.embedding[weights.first_token_row + tokens].float()
        for index, layer in enumerate(weights.layers):
            if layer.kind not in masks:
                masks[layer.kind] = self._mask(rows, layer.kind, visible, count)
            x = x + self._attention(index, layer, x, rows, positions, turn, masks[layer.kind])
            hidden = _normalise(layer.ffn_up(_normalise(x).to(weights.compute)))
            x = x + layer.ffn_down(torch.relu_(hidden)).float()
        cache.length[rows] = positions[:, -1] + 1
        cache.start[rows] = start[:, -1]
        return _normalise(x)

    def _mask(self, rows: slice, kind: tuple[int, float], visible: Tensor, count: int) -> Tensor:
        """What is added to logits: [S, 1, n, 1 + width (+ n, where there are several new tokens)]; 0 for the sink."""
        width, slope = kind
        new = torch.arange(count, device=visible.device)
        distance = self.cache.distances(rows, width)[:, None, :] + new[:, None]
        if count > 1:
            distance = torch.cat((distance, (new[:, None] - new).expand(len(visible), -1, -1)), dim=2)
        allowed = (distance >= 1) & (distance <= visible[..., None].clamp(max=width))
        mask = torch.where(allowed, -slope * math.log(2.0) * distance.float(), -math.inf)
        return functional.pad(mask, (SINK, 0))[:, None].to(self.weights.compute)

    def _attention(
        self, index: int, layer: LayerMatrices, x: Tensor, rows: slice, positions: Tensor, turn: tuple[Tensor, ...], mask: Tensor
    ) -> Tensor:
        """What attention adds to the state."""
        cache, compute = self.cache, self.weights.compute
        projected = layer.projection(_normalise(x).to(compute)).unflatten(-1, (4, -1, HEAD_CHANNELS))
        query, gate, value = _normalise(projected[:, :, :3]).unbind(2)
        query, key = _rotate(query, turn).transpose(1, 2), _rotate(projected[:, :, 3], turn).transpose(1, 2)
        value = value.transpose(1, 2)
        keys, values = cache.keys[index][rows], cache.values[index][rows]
        if positions.shape[1] > 1:
            attended = _attend(query, torch.cat((keys, key), 2), torch.cat((values, value), 2), mask)
        else:
            attended = _attend(query, keys, values, mask)
        cache.write(index, rows, positions, key, value)
        outer = gate.unflatten(-1, (COMBINER_REPLICAS, 1, _QUARTER)) * attended.transpose(1, 2).unflatten(
            -1, (1, COMBINER_REPLICAS, _QUARTER)
        )
        return layer.combiner(outer.flatten(2)).float()

    def _logits(self, state: Tensor) -> Tensor:
        return self.weights.final(state.to(self.weights.compute)).float() + self.weights.bias


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=LOGIT_SCALE)


def _normalise(x: Tensor) -> Tensor:
    """model/normalise.py, forward only."""
    groups = x.unflatten(-1, (-1, GROUP_CHANNELS))
    norm = torch.linalg.vector_norm(groups, dim=-1, keepdim=True, dtype=torch.float32)
    return (groups * norm.clamp_min_(_LEAST_NORM).reciprocal_().mul_(math.sqrt(GROUP_CHANNELS))).to(x.dtype).flatten(-2)


def _rotate(x: Tensor, turn: tuple[Tensor, ...]) -> Tensor:
    """model/rotary.py, forward only: x [S, n, H, 128]."""
    cosine, sine = turn
    pairs = x.unflatten(-1, (_BLOCKS, 2, _PAIRS)).float()
    crossed = torch.stack((-pairs[..., 1, :], pairs[..., 0, :]), dim=-2)
    return (pairs * cosine + crossed * sine).flatten(-3).to(x.dtype)
