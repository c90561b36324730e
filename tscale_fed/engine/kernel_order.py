"""Kernel order: where rows and columns of a layer's matrices stand when kernels read them.

Query and key rows: inside each head the two channels of a rotary pair stand side by side, 2p and 2p + 1 for frequency p (the model pairs k
with k + 32 inside blocks of 64 channels: tscale_fed/model/rotary.py). Gate and value rows, and combiner columns: blocked order
(tscale_fed/model/combiner.py). All other matrices stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_fed.model.combiner import blocked_channels
from tscale_fed.model.constants import HEAD_CHANNELS, ROTARY_BLOCK_CHANNELS
from tscale_fed.model.rotary import rotary_table

PROJECTIONS = ("query", "key", "gate", "value")
"""The segments of the joined projection matrix: canonical order, so that they lie side by side in the flat weights."""


def rotary_rows(heads: int) -> Tensor:
    """int64 [A]: natural row that stands at each place of query and key rows."""
    natural = torch.arange(heads * HEAD_CHANNELS)
    return natural.view(heads, -1, 2, ROTARY_BLOCK_CHANNELS // 2).transpose(2, 3).flatten()


def joined_rows(heads: int) -> Tensor:
    """int64 [4A]: row of the joined matrix (query, key, gate, value) that stands at each place."""
    width = heads * HEAD_CHANNELS
    rotary, blocked = rotary_rows(heads), blocked_channels(heads)
    return torch.cat((rotary, width + rotary, 2 * width + blocked, 3 * width + blocked))


def rotation(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cosine, sine) fp32 [T, 64]: angle of pair p at each position."""
    cosine, sine = rotary_table(tokens, device, torch.float32)
    return cosine.reshape(tokens, -1).contiguous(), sine.reshape(tokens, -1).contiguous()
