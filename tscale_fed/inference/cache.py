"""Keys and values of the last tokens of every sequence: one ring per layer, as long as the layer's window.

A token sees at most `width` tokens before it and never itself (model/attention.py), so a ring of `width` places holds all that any coming
token can see, however long the text grows. Place 0 is the sink: a key and a value of zero that every token sees; position p is kept at
place 1 + p mod width. Keys are turned by their positions, which may grow without bound: only differences matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_fed.model.constants import HEAD_CHANNELS
from tscale_fed.model.shape import ModelShape

SINK = 1
"""Places before the first position."""


class Cache:
    """For `slots` sequences. `length` int64 [slots]: tokens so far; `start`: where the present document of each begins."""

    def __init__(self, shape: ModelShape, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.slots = slots
        self.widths = [width for width, _ in shape.layers()]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for width in self.widths:
            size = (slots, shape.heads, SINK + width, HEAD_CHANNELS)
            self.keys.append(torch.zeros(size, device=device, dtype=dtype))
            self.values.append(torch.zeros(size, device=device, dtype=dtype))
        self.length = torch.zeros(slots, dtype=torch.int64, device=device)
        self.start = torch.zeros(slots, dtype=torch.int64, device=device)

    def clear(self, slot: int) -> None:
        """Forget a sequence. What its rings hold is never seen again: nothing is visible before position 0."""
        self.length[slot] = 0
        self.start[slot] = 0

    def move(self, source: int, target: int) -> None:
        """The sequence of slot `source` to `target`; what was there is lost."""
        for each in (*self.keys, *self.values, self.length, self.start):
            each[target].copy_(each[source])
        self.clear(source)

    def distances(self, rows: slice, width: int) -> Tensor:
        """int64 [S, width]: how far before the next position each place of a ring lies, 1..width."""
        place = torch.arange(width, device=self.length.device)
        return 1 + (self.length[rows, None] - 1 - place) % width

    def write(self, layer: int, rows: slice, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep key and value [S, H, n, 128] of positions [S, n], in rising order; of more than fit, the last."""
        width = self.widths[layer]
        if positions.shape[1] > width:
            positions, key, value = positions[:, -width:], key[:, :, -width:], value[:, :, -width:]
        place = SINK + positions % width
        each = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[layer][rows][each, :, place] = key.transpose(1, 2)
        self.values[layer][rows][each, :, place] = value.transpose(1, 2)

    @property
    def bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in (*self.keys, *self.values))

    @staticmethod
    def bytes_per_slot(shape: ModelShape, dtype: torch.dtype) -> int:
        """Of one sequence."""
        places = sum(SINK + width for width, _ in shape.layers())
        return 2 * places * shape.heads * HEAD_CHANNELS * dtype.itemsize
