"""Several deltas of one chunk added to the basepoint in one pass.

Enters: decoded deltas of one chunk. Leaves: basepoint += their sum. Integer addition commutes, so the bits are those of one after the
other. A kind of delta that can add many of its own at once says so by a static method `add_many(deltas, basepoint)`; others are added in
turn. On a GPU a chunk stays in its cache between such additions, so what counts there is the number of launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tscale_peers.codec_contract import Delta, Placed


def add_all(deltas: Sequence[Delta], basepoint: Tensor) -> None:
    """basepoint: the chunk's flat values, changed in place."""
    first = deltas[0]
    many = getattr(type(first), "add_many", None)
    if many is not None and len(deltas) > 1 and all(type(delta) is type(first) for delta in deltas):
        many(deltas, basepoint)
        return
    for delta in deltas:
        delta.add_to(basepoint)


def prepare(delta: Delta, device: torch.device) -> None:
    """Upload a delta's tensors ahead, on the current stream; a delta that has none to move comes along when it is added."""
    placed = getattr(delta, "placed", None)
    if isinstance(placed, Placed):
        placed.on(device)
