"""The exact exchange: every rank gets the mean of all gradients, in float32, part by part.

What a rank sends and receives, by a ring: 2 (R - 1) / R times 4 bytes per weight. The mean has the same bits on all ranks: each element is
summed once, somewhere, then copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from tscale_fed.model.parameters import Parameters
from tscale_fed.parallel.buckets import Bucket
from tscale_fed.parallel.group import Group


class GradientExchange(Protocol):
    """Turns every rank's own gradient, in `parameters.flat_grad`, into the one that all ranks step along."""

    buckets: Sequence[Bucket]
    group: Group
    bytes_per_step: int
    """That leave a rank for the others."""

    def ready(self, index: int) -> None:
        """Part `index` is complete on the current stream: exchange it, on a GPU beside what follows. Every rank calls in the same order."""
        ...

    def finish(self) -> None:
        """All parts are exchanged for whatever the current stream does next."""
        ...

    def even_out(self) -> dict[str, Tensor]:
        """Share out evenly what is held back, and return it for checkpoints: float32 tensors, views of what goes on changing."""
        ...

    def take_back(self, held_back: Mapping[str, Tensor]) -> None:
        """Start from what `even_out` returned, on any number of ranks; other names are ignored, missing ones are zero."""
        ...


class SideStream:
    """On a GPU, a stream beside the current one; on a processor, nothing."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after_current(self) -> AbstractContextManager[object]:
        """Inside, operations go to the side stream, after all that the current one has been given so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def join(self) -> None:
        """What the current stream is given from now on comes after all of the side stream."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class ExactExchange:
    """See the module; a `GradientExchange`."""

    def __init__(self, group: Group, parameters: Parameters, buckets: Sequence[Bucket]) -> None:
        self.buckets = buckets
        self.group = group
        ranks = group.world.size
        self.bytes_per_step = 2 * (ranks - 1) * 4 * parameters.flat_grad.numel() // ranks
        self._gradient = parameters.flat_grad
        self._side = SideStream(parameters.device)

    def ready(self, index: int) -> None:
        bucket = self.buckets[index]
        with self._side.after_current():
            self.group.reduce(self._gradient[bucket.start : bucket.stop], "mean")

    def finish(self) -> None:
        self._side.join()

    def even_out(self) -> dict[str, Tensor]:
        return {}

    def take_back(self, held_back: Mapping[str, Tensor]) -> None:
        """Nothing is held back; what a run with one-bit gradients left is dropped."""
