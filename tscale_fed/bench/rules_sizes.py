"""Sizes that the rules bench knows by name: model, batch, amount of text, arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

PLAIN = "plain"
"""The autograd model in float32; other arithmetics are the engine's."""


@dataclass(frozen=True)
class Size:
    """A preset."""

    dims: str
    fragments: int
    tokens: int
    text_bytes: float
    held_out: int
    """Fragments that losses at the end are taken over."""
    arithmetic: str
    lanes: int


SIZES = {
    "tiny": Size("e128h1d4w64", 4, 64, 200e3, 256, PLAIN, 1),
    "5m": Size("e256h2d8w256", 32, 256, 50e6, 1024, "int8", 2),
    "24m": Size("e256h2d36w256", 32, 256, 200e6, 1024, "int8", 2),
}
"""tiny: 0.7 M weights, for a processor. 5m and 24m: 5.4 and 23.7 M weights, for a GPU."""
