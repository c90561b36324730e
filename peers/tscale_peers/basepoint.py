"""The replica: this peer's copy of the swarm's model B, in integers, and the set of packets it contains.

Enters: checked packets, snapshot chunks. Leaves: B as integers or fp32, its hash, snapshot chunks for others.
Rule: B = start + sum of applied packets, in int32 multiples of each tensor's unit. Integer addition commutes, so equal applied sets mean
equal bits, whatever the order. Every packet counts once. A packet that would take a value beyond +-2**30 units is refused before anything
changes; whether it would depends on what came before, so such a refusal is not for ever: the packet is not in the applied set and may be
offered again. A running bound per chunk makes the check free until a run has nearly diverged.
Hash: BLAKE3 over the chunks' BLAKE3 hashes (int32, little-endian), kept per chunk until the chunk changes; state_reading.py.
B lives on the device that it was given, with the same bits everywhere. Only the meeting changes it, on the stream of its thread; others
read chunks on a lane of their own (lane.py), so nobody waits for a step.
Thread-safe by one lock, held for a chunk's work at a time: the trainer's thread applies, the event loop reads.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from blake3 import blake3
from torch import Tensor

from tscale_net.errors import Refused
from tscale_peers import limits, snapshot_chunk
from tscale_peers.applied import AppliedSet
from tscale_peers.codec import Codec, Delta
from tscale_peers.delta_batch import add_all
from tscale_peers.errors import refuse
from tscale_peers.lane import Lane
from tscale_peers.layout import Chunk, Layout
from tscale_peers.packet import Packet
from tscale_peers.state_reading import State, StateReading


class Watcher(Protocol):
    """Somebody who must hear of every change of B."""

    def applied(self, packet: Packet) -> None:
        """This packet has just been added."""
        ...

    def replaced(self) -> None:
        """A part of B, or all of it, was replaced."""
        ...


class Replica:
    """B and its applied set. Starts at zero and empty: fill it with `set_start` or `load_chunk`."""

    def __init__(
        self,
        layout: Layout,
        codec: Codec,
        max_streams: int = limits.applied_default_streams,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layout = layout
        self.codec = codec
        self.lock = threading.RLock()
        self.basepoint = torch.zeros(layout.size, dtype=codec.basepoint_dtype, device=device)
        """int32 [layout.size], on `device`; change it only through this class."""
        self.device = self.basepoint.device
        self.lane = Lane(self.device)
        self.applied = AppliedSet(len(layout.chunks), max_streams)
        self.recent: deque[State] = deque(maxlen=limits.recent_states)
        """Distinct states in the order in which `state` saw them, the newest last."""
        self.watcher: Watcher | None = None
        self._bounds: list[float] = [0] * len(layout.chunks)
        self._hashes: list[bytes] = [b""] * len(layout.chunks)
        self._readings: list[StateReading] = []

    # -- start weights -------------------------------------------------------------------------------------------------

    def set_start(self, weights: Tensor) -> None:
        """B = the nearest multiples of the units; the applied set becomes empty. weights: fp32 flat, any device.

        Raises Refused("not-finite"), "out-of-range", naming the tensor; nothing is changed then.
        """
        for chunk in self.layout.chunks:
            self._check_start(chunk.of(weights).detach(), chunk)
        with self.lock:
            for chunk in self.layout.chunks:
                self._to_grid(chunk.of(weights).detach().to(self.device), chunk)
            self.applied = AppliedSet(self.applied.chunks, self.applied.max_streams)
            self._all_changed()

    def restore(self, basepoint: Tensor, applied: AppliedSet) -> None:
        """Continue from a checkpoint: both as they were together. Raises Refused("bad-checkpoint"), "out-of-range"."""
        if basepoint.shape != self.basepoint.shape or basepoint.dtype != self.basepoint.dtype or applied.chunks != self.applied.chunks:
            raise refuse("bad-checkpoint", "the checkpoint's basepoint does not fit this run: its tensors or chunks differ")
        for chunk in self.layout.chunks:
            self._check_values(chunk, chunk.of(basepoint))
        with self.lock:
            self.basepoint.copy_(basepoint)
            self.applied = applied.copy()
            self._all_changed()

    def _check_start(self, values: Tensor, chunk: Chunk) -> None:
        for s in chunk.segments:
            largest = _largest(values[s.start : s.stop])
            if not math.isfinite(largest):
                raise refuse("not-finite", f"start weights of {self.layout.tensors_of(chunk)} hold NaN or infinite values")
            if round(largest / s.unit) > limits.basepoint_range:
                name = self.layout.specs[s.tensor].name
                raise refuse("out-of-range", f"start weights of {name} exceed 2**30 units; unit exponent {s.unit_exponent} is too small")

    def _to_grid(self, values: Tensor, chunk: Chunk) -> None:
        for s in chunk.segments:
            units = values[s.start : s.stop].to(torch.float64) / s.unit
            if self.basepoint.dtype == torch.int32:
                units.round_()
            chunk.of(self.basepoint)[s.start : s.stop].copy_(units)

    def _check_values(self, chunk: Chunk, values: Tensor) -> float:
        largest = _largest(values)
        if largest > limits.basepoint_range:
            raise refuse("out-of-range", f"values of {self.layout.tensors_of(chunk)} exceed the range of +-2**30 units")
        return largest

    def _all_changed(self) -> None:
        self.lane.mark()
        for reading in self._readings:
            reading.spoil()
        for chunk in self.layout.chunks:
            self._bounds[chunk.index] = _largest(chunk.of(self.basepoint))
            self._hashes[chunk.index] = b""
        if self.watcher is not None:
            self.watcher.replaced()

    # -- packets -------------------------------------------------------------------------------------------------------

    def apply(self, packet: Packet) -> bool:
        """B += c*q of a checked packet; False if it is contained already.

        Raises Refused: "out-of-range", "too-many-streams", "too-many-gaps". Nothing is changed then.
        """
        (outcome,) = self.apply_all([packet])
        if isinstance(outcome, Refused):
            raise outcome
        return outcome

    def apply_all(self, packets: Sequence[Packet]) -> list[bool | Refused]:
        """`apply` for packets of one chunk, whose deltas are added in one go. For each: was it fresh, or why was it refused?"""
        chunk = self.layout.chunks[packets[0].chunk]
        outcomes: list[bool | Refused] = []
        taken: list[Packet] = []
        with self.lock:
            for packet in packets:
                try:
                    fresh = self._admit(chunk, packet, taken)
                except Refused as refusal:
                    outcomes.append(refusal)
                    continue
                outcomes.append(fresh)
            self._add(chunk, taken)
        return outcomes

    def _admit(self, chunk: Chunk, packet: Packet, taken: list[Packet]) -> bool:
        """Note one packet as applied; it goes to `taken`. False if it is contained already. Raises Refused."""
        if not self.applied.can_add(*packet.key):
            return False
        if self._bounds[chunk.index] + packet.delta.largest_step > limits.basepoint_range:
            self._add(chunk, taken)  # the check looks at the values themselves
            taken.clear()
            self.check_range(chunk, packet.delta)
        self._bounds[chunk.index] += packet.delta.largest_step
        taken.append(packet)
        self.applied.add(*packet.key)
        self.applied.note_batches(packet.stream_key, packet.header.batches_total)
        return True

    def _add(self, chunk: Chunk, packets: Sequence[Packet]) -> None:
        if not packets:
            return
        self._before_change(chunk)
        add_all([packet.delta for packet in packets], chunk.of(self.basepoint))
        self.lane.mark()
        if self.watcher is not None:
            for packet in packets:
                self.watcher.applied(packet)

    def _before_change(self, chunk: Chunk) -> None:
        """Whoever is reading the state gets a copy of the chunk as it is."""
        for reading in self._readings:
            reading.before_change(chunk.index, chunk.of(self.basepoint))
        self._hashes[chunk.index] = b""

    def check_range(self, chunk: Chunk, delta: Delta) -> None:
        """Raises Refused("out-of-range") if adding `delta` now would leave the range. Changes nothing."""
        with self.lock:
            step = delta.largest_step
            if self._bounds[chunk.index] + step <= limits.basepoint_range:
                return
            self._bounds[chunk.index] = _largest(chunk.of(self.basepoint))
            if self._bounds[chunk.index] + step <= limits.basepoint_range:
                return
            trial = self.lane.fetch(chunk.of(self.basepoint))
        delta.add_to(trial)
        self._check_values(chunk, trial)

    def applied_copy(self) -> AppliedSet:
        """The applied set as of now, independent of what comes."""
        with self.lock:
            return self.applied.copy()

    # -- weights -------------------------------------------------------------------------------------------------------

    def chunk_weights(self, index: int, out: Tensor) -> Tensor:
        """B of one chunk in weight units, into `out` (its flat values, fp32 or fp64, any device)."""
        chunk = self.layout.chunks[index]
        with self.lock:
            out.copy_(chunk.of(self.basepoint))
        for s in chunk.segments:
            out[s.start : s.stop].mul_(s.unit)
        return out

    def weights(self) -> Tensor:
        """B as one new flat fp32 vector on the CPU: what to evaluate and to hand over."""
        flat = torch.empty(self.layout.size, dtype=torch.float32)
        for chunk in self.layout.chunks:
            self.chunk_weights(chunk.index, chunk.of(flat))
        return flat

    # -- hash ----------------------------------------------------------------------------------------------------------

    def hash(self) -> bytes:
        """32 bytes, equal exactly for equal basepoints."""
        return self.state()[1]

    def state(self) -> State:
        """(applied digest, hash) of one moment; also appended to `recent` if it is new."""
        state = self.read_state(self.begin_reading())
        if state is not None:
            return state
        with self.lock:  # so much changed meanwhile that the reading was spoilt: now nothing can
            state = self.read_state(self.begin_reading())
        assert state is not None
        return state

    def begin_reading(self) -> StateReading:
        """Hold on to the state of this moment. It costs a copy of each chunk that changes before it was read, and nothing else."""
        with self.lock:
            reading = StateReading(self.applied.digest(), list(self._hashes))
            self._readings.append(reading)
            return reading

    def read_state(self, reading: StateReading) -> State | None:
        """Hash what `begin_reading` held on to, on any thread. None if too much changed meanwhile to be held."""
        while (index := self._next_unread(reading)) is not None:
            with self.lock:
                values = reading.take(index, self.layout.chunks[index].of(self.basepoint))
                copy = self.lane.fetch(values) if values is not None else None
            if copy is None:
                break
            value = blake3(snapshot_chunk.raw_bytes(copy)).digest()
            with self.lock:
                if reading.note(index, value):
                    self._hashes[index] = value
        with self.lock:
            self._readings.remove(reading)
            state = reading.state()
            if state is not None and state not in self.recent:
                self.recent.append(state)
        return state

    def _next_unread(self, reading: StateReading) -> int | None:
        with self.lock:
            return reading.next()

    def chunk_hash(self, index: int) -> bytes:
        """32 bytes for one chunk's values."""
        with self.lock:
            if not self._hashes[index]:
                copy = self.lane.fetch(self.layout.chunks[index].of(self.basepoint))
                self._hashes[index] = blake3(snapshot_chunk.raw_bytes(copy)).digest()
            return self._hashes[index]

    # -- snapshot chunks -----------------------------------------------------------------------------------------------

    def read_chunk(self, index: int) -> bytes:
        """One chunk's values and its part of the applied set, of one moment, for a newcomer."""
        with self.lock:
            values = self.lane.fetch(self.layout.chunks[index].of(self.basepoint))
            entries = self.applied.chunk_entries(index)
        return snapshot_chunk.encode(index, values, entries)

    def load_chunk(self, index: int, data: bytes) -> None:
        """Replace one chunk by what a donor's `read_chunk` gave. What the donor lacked comes again as packets.

        Raises Refused: "bad-chunk", "out-of-range", "too-many-streams", "bad-applied-set". Nothing is changed then.
        """
        chunk = self.layout.chunks[index]
        values, entries = snapshot_chunk.decode(data, index, chunk.size, self.basepoint.dtype, self.applied.max_streams)
        largest = self._check_values(chunk, values)
        with self.lock:
            self.applied.replace_chunk(index, entries)
            self._before_change(chunk)
            chunk.of(self.basepoint).copy_(values)
            self.lane.mark()
            self._bounds[index] = largest
            if self.watcher is not None:
                self.watcher.replaced()


def _largest(values: Tensor) -> float:
    """Largest |value|; the two ends rather than abs(), since the absolute value of the least int32 is itself."""
    low, high = torch.aminmax(values)
    return max(-low.item(), high.item())
