"""Packets made of the displacement beside training: captured between two steps, encoded and signed on another thread during the next.

Enters: the displacement, slice by slice; what to make of each chunk; how to keep what was made. Leaves: everything that was made and kept.
    between two steps   `advance`: d of the next slice is copied to a buffer; one operation per stretch of a unit, no waiting
    meanwhile           a helper thread encodes, signs and uploads each chunk of the slice, on a lane of its own; when no slice is left, it
                        keeps everything: writes it to the log, synced
    between two steps   `advance` settles all of it: only now does anything change that others could see
Chunks are independent, so they need not be of one moment: a model is cut into `limits.draft_slices` slices, one per meeting, and the buffer
has the size of one. Without a helper the same happens at once, on the calling thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

import torch
from torch import Tensor

from tscale_peers import limits
from tscale_peers.displacement import Displacement
from tscale_peers.lane import Lane
from tscale_peers.layout import Chunk

T = TypeVar("T")
R = TypeVar("R")
Make = Callable[[Chunk, Tensor], T]
"""What is made of one chunk and a copy of its displacement, which may be changed. On the helper thread."""


class Desk:
    """Where drafts are made: the buffer, the lane, the helper thread. One drafting at a time."""

    def __init__(self, place: Displacement, chunks: Sequence[Chunk], like: Tensor, device: torch.device, helper: Executor | None) -> None:
        """like: a tensor of the displacement's dtype. device: the replica's."""
        self.place = place
        self.helper = helper
        self.lane = Lane(device)
        self._dtype, self._device = like.dtype, device
        self.slice_values = max(max(chunk.size for chunk in chunks), draft_values(chunks[-1].stop))
        self._buffer: Tensor | None = None

    @property
    def buffer(self) -> Tensor:
        """fp [slice_values] on the replica's device; made when it is first used."""
        if self._buffer is None:
            self._buffer = torch.empty(self.slice_values, dtype=self._dtype, device=self._device)
        return self._buffer


class Drafting(Generic[T, R]):
    """One run through all of `chunks` (ascending). Owner's thread; `make` and `keep` run on the helper."""

    def __init__(
        self,
        desk: Desk,
        chunks: Sequence[Chunk],
        *,
        before: Callable[[Chunk], None],
        make: Make[T],
        keep: Callable[[list[T]], None],
        settle: Callable[[list[T]], R],
    ) -> None:
        """before: called for each chunk on the owner's thread when its displacement is captured. settle: called there with all that was
        made, in the order of the chunks, when it is kept."""
        self._desk = desk
        self._slices = _slices(chunks, desk.slice_values)
        self._make, self._keep, self._before, self._settle = make, keep, before, settle
        self._made: list[T] = []
        self._kept = False
        self._job: Future[None] | None = None

    def advance(self) -> R | None:
        """Go on as far as possible without waiting. What `settle` gave, once; None before that. Raises what the three raise: it is over
        then, and what they had not done is not done."""
        while self._job is None or self._job.done():
            if self._job is not None:
                self._job.result()
                self._job = None
            if self._kept:
                return self._settle(self._made)
            self._start(self._slices.pop(0) if self._slices else [])
        return None

    def finish(self) -> R:
        """As `advance`, waiting."""
        while (settled := self.advance()) is None:
            assert self._job is not None
            self._job.exception()
        return settled

    def _start(self, chunks: list[Chunk]) -> None:
        """The next slice; without chunks: keep what was made."""
        for chunk in chunks:
            self._before(chunk)
        parts: list[tuple[Chunk, Tensor]] = []
        filled = 0
        for span in self._desk.place.spans(chunks):
            d = self._desk.place.capture(span, out=self._desk.buffer[filled : filled + span.size])
            parts += [(chunk, span.part(chunk, d)) for chunk in span.chunks]
            filled += span.size
        self._desk.lane.mark()
        if self._desk.helper is None:
            self._job = Future()
            try:
                self._work(parts)
            except BaseException as error:
                self._job.set_exception(error)
            else:
                self._job.set_result(None)
        else:
            self._job = self._desk.helper.submit(self._work, parts)

    def _work(self, parts: list[tuple[Chunk, Tensor]]) -> None:
        with self._desk.lane:
            for chunk, d in parts:
                self._made.append(self._make(chunk, d))
        if not self._slices:
            self._keep(self._made)
            self._kept = True


def draft_values(size: int) -> int:
    """Values of the buffer for a model of `size` values, unless a chunk has more."""
    return min(size, max(limits.draft_slice_values, -(-size // limits.draft_slices)))


def _slices(chunks: Sequence[Chunk], most_values: int) -> list[list[Chunk]]:
    """Chunks in order, together as far as they fit."""
    slices: list[list[Chunk]] = []
    size = 0
    for chunk in chunks:
        if slices and size + chunk.size <= most_values:
            slices[-1].append(chunk)
            size += chunk.size
        else:
            slices.append([chunk])
            size = chunk.size
    return slices
