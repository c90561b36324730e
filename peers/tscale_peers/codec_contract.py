"""What every codec promises, and what all of them share: how a chunk of displacement becomes payload bytes, and these integer steps.

Enters: the displacement of a chunk, the author's coefficient c. Leaves: payload bytes within a bound fixed by layout and codec; a
`Delta`, opened from checked payload, that adds itself to a basepoint.
Contract of every codec, relied on by the replica:
- a decoded delta is c*q as integer multiples of each segment's unit, by integer arithmetic alone, so all receivers add the same numbers;
- q = decoded / c satisfies ||d - q|| <= ||d|| up to the rounding of steps to units; the author keeps the remainder (error feedback);
- a payload has one spelling; `open` refuses every other, and allocates nothing that the chunk's own bound does not allow.
The arithmetic belongs to the codec (`basepoint_dtype`): production codecs use int32; a test may bring one in float64 to compare the rule
itself with an oracle beyond the grid, through the same replica and exchange.
Tensors may live on any device: an encoder works where the displacement is and fetches its picks, signs and codes, a delta goes where it is
added to. Nothing else crosses the bus.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tscale_net.errors import Refused
from tscale_peers.errors import refuse
from tscale_peers.layout import Chunk


class Delta(Protocol):
    """A decoded payload of one chunk."""

    @property
    def largest_step(self) -> int:
        """No value of the basepoint moves by more than this many units."""
        ...

    def add_to(self, basepoint: Tensor, sign: int = 1) -> None:
        """basepoint += sign * c*q in units, in place. basepoint: the chunk's flat values, codec.basepoint_dtype, any device."""
        ...

    def take_from(self, displacement: Tensor, divisor: float = 1.0) -> None:
        """displacement -= c*q / divisor in weight units, in place. displacement: the chunk's flat values, fp32 or fp64, any device."""
        ...


@dataclass(slots=True)
class CodecMemory:
    """What an encoder may keep of one author and one chunk from publication to publication, such as where an iteration starts.

    It helps the author only: nobody needs it for decoding, and it may be lost at any time. Keys are numbers of segments in the chunk.
    """

    tensors: dict[int, Tensor] = field(default_factory=dict)


class Codec(Protocol):
    """One way to write deltas. Stateless."""

    @property
    def name(self) -> str:
        """As manifests and packet headers spell it."""
        ...

    @property
    def basepoint_dtype(self) -> torch.dtype: ...

    def max_payload_bytes(self, chunk: Chunk) -> int:
        """No payload for this chunk is longer; of codecs with payloads of one size: exactly that size."""
        ...

    def encode(self, displacement: Tensor, chunk: Chunk, coefficient: float, memory: CodecMemory | None = None) -> bytes:
        """Payload of c * codec(d). displacement: the chunk's flat fp32 or fp64 values, any device; unchanged. coefficient: above 0.
        memory: of this author and chunk, changed. Raises Refused("not-finite")."""
        ...

    def open(self, payload: bytes, chunk: Chunk) -> Delta:
        """Check and decode. Raises Refused: "packet-truncated", "packet-oversized", "packet-scale", "packet-payload"."""
        ...


class Placed:
    """Tensors of a decoded delta: on the CPU first, moved to the device where they are wanted, and kept there."""

    __slots__ = ("_tensors",)

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The tensors, on `device`."""
        if any(tensor.device != device for tensor in self._tensors):
            self._tensors = tuple(tensor.to(device) for tensor in self._tensors)
        return self._tensors


def host_array(parts: Iterable[Tensor]) -> np.ndarray:
    """Flat tensors of one dtype and device, one after the other, as an array of the CPU: one copy over the bus for all of them."""
    listed = list(parts)
    joined = listed[0] if len(listed) == 1 else torch.cat(listed)
    result: np.ndarray = joined.cpu().numpy()
    return result


def check_length(payload: bytes, expected: int) -> None:
    """Of payloads with one size. Raises Refused("packet-truncated" | "packet-oversized")."""
    if len(payload) != expected:
        code = "packet-truncated" if len(payload) < expected else "packet-oversized"
        raise refuse(code, f"a payload of {len(payload)} bytes where its chunk and codec give {expected}")


def not_finite(chunk: Chunk) -> Refused:
    """The refusal of a displacement that no codec can write."""
    where = f"chunk {chunk.index}"
    return refuse("not-finite", f"{where}: the local weights hold NaN or infinite values; lower the rate or restore a checkpoint")
