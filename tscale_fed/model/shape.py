"""Model shape: enters a dims string and a vocabulary size, leaves every size, the layers and the list of matrices.

A dims string is letters followed by a number, repeated: `e256h2d36w256relu2`.
    e     state width, a multiple of 128 (default 256)
    h     heads of 128 channels (default 1)
    d     depth in layers, each one attention and one feed-forward step (default 60); odd depths are rounded up, 1 is allowed for profiling
    w     window in tokens of the wide attention layers (default 64)
    relu  feed-forward width in units of 128 * heads (default 1)
Layers: with g = ceil(d/2) pairs, the first max(1, floor(g/6)) pairs attend to the previous token only; every other pair is one layer of
width 64 with alibi slope 0.5 and one of width `w` without slope. (TScale; its documentation differs from its code, this follows the code.)
"""

import re
from dataclasses import dataclass
from functools import cached_property

from tscale_fed.model.constants import (
    COMBINER_REPLICAS,
    GROUP_CHANNELS,
    GROUPS_PER_PREVIOUS,
    HEAD_CHANNELS,
    LOCAL_SLOPE,
    LOCAL_WIDTH,
    PREVIOUS_WIDTH,
    SINGLE_LAYER_SLOPE,
)

_FIELDS = {"e": "width", "h": "heads", "d": "depth", "w": "window", "relu": "ffn_multiple"}
_PART = re.compile(r"([a-z]+)([0-9]+)")
_LARGEST = 1_000_000
"""No size of a real model comes near this; a bigger number is a typing error and would only exhaust memory."""


class ShapeError(ValueError):
    """A model shape that cannot be built; the message is one sentence with the fix."""


@dataclass(frozen=True)
class ModelShape:
    """All sizes of a model. `vocab` counts tokens (the fragment-start token included), `noise_rows` embedding rows used as noise."""

    width: int
    heads: int
    depth: int
    window: int
    ffn_multiple: int
    vocab: int
    noise_rows: int = 0

    @classmethod
    def parse(cls, dims: str, vocab: int, noise_rows: int = 0) -> "ModelShape":
        """Read a dims string. Raises ShapeError for unknown letters, repeated letters, missing numbers and impossible sizes."""
        sizes = {"width": 256, "heads": 1, "depth": 60, "window": 64, "ffn_multiple": 1}
        seen: set[str] = set()
        at = 0
        while at < len(dims):
            part = _PART.match(dims, at)
            if part is None:
                raise ShapeError(f"model dims {dims!r}: expected letters followed by a whole number at {dims[at:]!r}, as in e256h2d36w256")
            letters, number = part.groups()
            if letters not in _FIELDS:
                raise ShapeError(f"model dims {dims!r}: unknown {letters!r}; known are {', '.join(_FIELDS)}")
            if letters in seen:
                raise ShapeError(f"model dims {dims!r}: {letters!r} is given twice; keep one")
            if len(number) > len(str(_LARGEST)):
                raise ShapeError(f"model dims {dims!r}: {letters}{number} is out of range 1 to {_LARGEST}")
            seen.add(letters)
            sizes[_FIELDS[letters]] = int(number)
            at = part.end()
        return cls(**sizes, vocab=vocab, noise_rows=noise_rows)

    def __post_init__(self) -> None:
        for letters, field in _FIELDS.items():
            if not 1 <= getattr(self, field) <= _LARGEST:
                raise ShapeError(f"model dims: {letters}{getattr(self, field)} is out of range 1 to {_LARGEST}")
        if self.width % GROUP_CHANNELS:
            raise ShapeError(f"model dims: e{self.width} is not a multiple of {GROUP_CHANNELS}; use e{self._nearest_width()}")
        if not 1 <= self.vocab:
            raise ShapeError(f"model vocabulary of {self.vocab} tokens: at least one is needed")
        if self.noise_rows < 0:
            raise ShapeError(f"model noise rows: {self.noise_rows} is negative; use 0 for none")

    def _nearest_width(self) -> int:
        return max(GROUP_CHANNELS, round(self.width / GROUP_CHANNELS) * GROUP_CHANNELS)

    @property
    def dims(self) -> str:
        """The dims string of this shape, all letters given."""
        return "".join(f"{letters}{getattr(self, field)}" for letters, field in _FIELDS.items())

    @property
    def heads_width(self) -> int:
        """A: width of queries, keys, gates and values, all heads together."""
        return HEAD_CHANNELS * self.heads

    @property
    def ffn_width(self) -> int:
        """F: width of the feed-forward layer."""
        return HEAD_CHANNELS * self.heads * self.ffn_multiple

    @property
    def embedding_rows(self) -> int:
        """Noise rows, one row for a dropped token, one row per token; in this order."""
        return self.noise_rows + 1 + self.vocab

    @cached_property
    def _layers(self) -> tuple[tuple[int, float], ...]:
        if self.depth == 1:
            return ((self.window, SINGLE_LAYER_SLOPE),)
        pairs = (self.depth + 1) // 2
        previous = max(1, pairs // GROUPS_PER_PREVIOUS)
        return ((PREVIOUS_WIDTH, 0.0),) * (2 * previous) + ((LOCAL_WIDTH, LOCAL_SLOPE), (self.window, 0.0)) * (pairs - previous)

    def layers(self) -> list[tuple[int, float]]:
        """(attention width in tokens, alibi slope in base-2 units per token) of every layer, bottom first."""
        return list(self._layers)

    def tensors(self) -> list[tuple[str, int, int]]:
        """(name, rows, columns) of every trained matrix in canonical order. Rows are outputs, columns inputs."""
        width, heads_width, ffn_width = self.width, self.heads_width, self.ffn_width
        matrices = [("embedding", self.embedding_rows, width), ("final", self.vocab, width)]
        for layer in range(len(self._layers)):
            for name in ("query", "key", "gate", "value"):
                matrices.append((f"layers.{layer}.{name}", heads_width, width))
            matrices.append((f"layers.{layer}.combiner", width, COMBINER_REPLICAS * heads_width))
            matrices.append((f"layers.{layer}.ffn_up", ffn_width, width))
            matrices.append((f"layers.{layer}.ffn_down", width, ffn_width))
        return matrices

    @property
    def trained_parameters(self) -> int:
        """Elements of all matrices: the length of the flat weight vector."""
        return sum(rows * columns for _, rows, columns in self.tensors())

    @property
    def parameters(self) -> int:
        """Parameter count as published for TScale models: all matrices and the fixed output bias."""
        return self.trained_parameters + self.vocab
