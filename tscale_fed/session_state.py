"""A peer's state for a checkpoint, copied part by part between steps.

Enters: the running parts. Leaves: (own steps, tensors, blobs, facts) on the CPU, for the checkpoint store.
A model of up to `CHECKPOINT_PART_VALUES` weights is copied at one moment. A larger one would stop training for seconds, so each of its
parts is of a moment of its own, one step after the other. What the exchange must find consistent belongs to chunks: basepoint,
displacement, which packets the two contain, what is given to owners. Weights and momentum of different parts may be some steps apart.
The running average is of one moment by its nature; of a larger model it is left out, and begins anew after a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tscale_fed.averaging import saved_average
from tscale_fed.limits import CHECKPOINT_PART_VALUES
from tscale_fed.trainer import Trainer
from tscale_peers.applied import AppliedSet
from tscale_peers.displacement import Span, spans_of
from tscale_peers.peer import SwarmPeer
from tscale_peers.pledges import SavedChunk

State = tuple[int, dict[str, Tensor], dict[str, bytes], dict[str, Any]]
"""(own steps, tensors, blobs, facts) of a checkpoint."""
Facts = Callable[[], Mapping[str, Any]]
"""What the session adds."""


class StateCopy:
    """One copy. `take` every part in order, each on the training thread or when that has ended; then `finish` there."""

    def __init__(self, peer: SwarmPeer, trainer: Trainer, facts: Facts) -> None:
        """Any thread: takes memory, and copies nothing yet."""
        exchange, layout = peer.meeting.exchange, peer.meeting.replica.layout
        self.parts = spans_of(layout.chunks, max(CHECKPOINT_PART_VALUES, max(chunk.size for chunk in layout.chunks)))
        self._peer, self._trainer, self._facts = peer, trainer, facts
        self._sources = {**trainer.large_tensors(), "basepoint": peer.meeting.replica.basepoint}
        kinds = {**{name: tensor.dtype for name, tensor in self._sources.items()}, "displacement": exchange.weights.dtype}
        # Memory is touched here, so that the training thread does not wait for it.
        self._tensors = {name: torch.empty(layout.size, dtype=dtype).fill_(0) for name, dtype in kinds.items()}
        self._applied = AppliedSet(len(layout.chunks), peer.meeting.replica.applied.max_streams)
        self._paid = AppliedSet(len(layout.chunks), max_streams=1)
        self._pledges: list[SavedChunk] = []
        self._pledged_batches = (0, 0)
        self._from_step = 0
        self._average: tuple[dict[str, Tensor], dict[str, int]] = ({}, {})

    def take(self, part: Span) -> None:
        """Copy one part."""
        meeting = self._peer.meeting
        with meeting.exclusively():
            if part.start == 0:
                self._from_step = self._trainer.steps
                self._pledged_batches = meeting.exchange.pledges.counts
            for name, source in self._sources.items():
                part.of(self._tensors[name]).copy_(part.of(source.detach()))
            meeting.exchange.copy_displacement(part, self._tensors["displacement"])
            for chunk in part.chunks:
                self._applied.replace_chunk(chunk.index, meeting.replica.applied.chunk_entries(chunk.index))
                self._paid.replace_chunk(chunk.index, meeting.exchange.paid.chunk_entries(chunk.index))
                self._pledges.append(meeting.exchange.pledges.saved_chunk(chunk.index))
            if len(self.parts) == 1:
                self._average = saved_average(meeting.average)

    def finish(self) -> State:
        """The rest, which is small."""
        peer, trainer = self._peer, self._trainer
        sums, average_facts = self._average
        blobs = {
            "applied": self._applied.encode(),
            "paid": self._paid.encode(),
            "pledges": peer.meeting.exchange.pledges.encode(self._pledges, self._pledged_batches),
            "sums": peer.spreading.summing.sums.encode(),
        }
        facts = {**trainer.state_facts(), **average_facts, "copied_from_step": self._from_step, **self._facts()}
        return trainer.steps, {**self._tensors, **trainer.small_tensors(), **sums}, blobs, facts

    def at_once(self) -> State:
        """All parts now: for who has nothing to wait for."""
        for part in self.parts:
            self.take(part)
        return self.finish()
