"""The replica: this peer's copy of the swarm's model B, in integers, and the set of packets it contains.

Enters: checked packets, snapshot chunks. Leaves: B as integers or fp32, its hash, snapshot chunks for others.
Rule: B = start + sum of applied packets, in int32 multiples of each tensor's unit. Integer addition commutes, so equal applied sets mean
equal bits, whatever the order. Every packet counts once. A packet that would take a value beyond +-2**30 units is refused before anything
changes; whether it would depends on what came before, so such a refusal is not for ever: the packet is not in the applied set and may be
offered again. A running bound per chunk makes the check free until a run has nearly diverged.
Hash: BLAKE3 over the chunks' BLAKE3 hashes (int32, little-endian), kept per chunk until the chunk changes.
Thread-safe by one lock, held for a chunk's work at a time: the trainer's thread applies, the event loop reads.
"""

from __future__ import annotations

import threading
from collections import deque

import torch
from blake3 import blake3
from torch import Tensor

from tscale_peers import limits, snapshot_chunk
from tscale_peers.applied import AppliedSet
from tscale_peers.codec import Codec, Delta
from tscale_peers.errors import refuse
from tscale_peers.layout import Chunk, Layout
from tscale_peers.packet import Packet

State = tuple[bytes, bytes]
"""(applied digest, basepoint hash), 32 bytes each, of one moment."""


class Replica:
    """B and its applied set. Starts at zero and empty: fill it with `set_start` or `load_chunk`."""

    def __init__(self, layout: Layout, codec: Codec, max_streams: int = limits.applied_default_streams) -> None:
        self.layout = layout
        self.codec = codec
        self.lock = threading.RLock()
        self.basepoint = torch.zeros(layout.size, dtype=codec.basepoint_dtype)
        """int32 [layout.size], CPU; change it only through this class."""
        self.applied = AppliedSet(len(layout.chunks), max_streams)
        self.recent: deque[State] = deque(maxlen=limits.recent_states)
        """Distinct states in the order in which `state` saw them, the newest last."""
        self._bounds: list[float] = [0] * len(layout.chunks)
        self._hashes: list[bytes] = [b""] * len(layout.chunks)

    # -- start weights -------------------------------------------------------------------------------------------------

    def set_start(self, weights: Tensor) -> None:
        """B = the nearest multiples of the units; the applied set becomes empty. weights: fp32 flat, any device.

        Raises Refused("not-finite"), "out-of-range", naming the tensor; nothing is changed then.
        """
        start = torch.empty_like(self.basepoint)
        for chunk in self.layout.chunks:
            self._to_grid(chunk.of(weights).detach().cpu(), chunk, chunk.of(start))
        with self.lock:
            self.basepoint.copy_(start)
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

    def _to_grid(self, values: Tensor, chunk: Chunk, out: Tensor) -> None:
        if not bool(torch.isfinite(values).all()):
            raise refuse("not-finite", f"start weights of {self.layout.tensors_of(chunk)} hold NaN or infinite values")
        for s in chunk.segments:
            units = values[s.start : s.stop].to(torch.float64) / s.unit
            if out.dtype == torch.int32:
                units.round_()
            if _largest(units) > limits.basepoint_range:
                name = self.layout.specs[s.tensor].name
                raise refuse("out-of-range", f"start weights of {name} exceed 2**30 units; unit exponent {s.unit_exponent} is too small")
            out[s.start : s.stop].copy_(units)

    def _check_values(self, chunk: Chunk, values: Tensor) -> float:
        largest = _largest(values)
        if largest > limits.basepoint_range:
            raise refuse("out-of-range", f"values of {self.layout.tensors_of(chunk)} exceed the range of +-2**30 units")
        return largest

    def _all_changed(self) -> None:
        for chunk in self.layout.chunks:
            self._bounds[chunk.index] = _largest(chunk.of(self.basepoint))
            self._hashes[chunk.index] = b""

    # -- packets -------------------------------------------------------------------------------------------------------

    def apply(self, packet: Packet) -> bool:
        """B += c*q of a checked packet; False if it is contained already.

        Raises Refused: "out-of-range", "too-many-streams", "too-many-gaps". Nothing is changed then.
        """
        chunk = self.layout.chunks[packet.chunk]
        with self.lock:
            if not self.applied.can_add(*packet.key):
                return False
            self.check_range(chunk, packet.delta)
            packet.delta.add_to(chunk.of(self.basepoint))
            self._bounds[chunk.index] += packet.delta.largest_step
            self._hashes[chunk.index] = b""
            self.applied.add(*packet.key)
            self.applied.note_batches(packet.stream_key, packet.header.batches_total)
        return True

    def check_range(self, chunk: Chunk, delta: Delta) -> None:
        """Raises Refused("out-of-range") if adding `delta` now would leave the range. Changes nothing."""
        with self.lock:
            step = delta.largest_step
            if self._bounds[chunk.index] + step <= limits.basepoint_range:
                return
            self._bounds[chunk.index] = _largest(chunk.of(self.basepoint))
            if self._bounds[chunk.index] + step <= limits.basepoint_range:
                return
            trial = chunk.of(self.basepoint).clone()
        delta.add_to(trial)
        self._check_values(chunk, trial)

    def applied_copy(self) -> AppliedSet:
        """The applied set as of now, independent of what comes."""
        with self.lock:
            return self.applied.copy()

    # -- weights -------------------------------------------------------------------------------------------------------

    def chunk_weights(self, index: int, out: Tensor) -> Tensor:
        """B of one chunk in weight units, into `out` (its flat values, fp32 or fp64, CPU)."""
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
        """(applied digest, hash) of one moment; also appended to `recent` if it is new.

        Hashes changed chunks one by one without holding the lock between them, so the trainer is never held up for long.
        """
        for _ in range(limits.hash_passes):
            if not self._hash_changed():
                break
        with self.lock:
            self._hash_changed()
            state = (self.applied.digest(), blake3(b"".join(self._hashes)).digest())
            if state not in self.recent:
                self.recent.append(state)
        return state

    def chunk_hash(self, index: int) -> bytes:
        """32 bytes for one chunk's values."""
        with self.lock:
            if not self._hashes[index]:
                self._hashes[index] = blake3(snapshot_chunk.raw_bytes(self.layout.chunks[index].of(self.basepoint))).digest()
            return self._hashes[index]

    def _hash_changed(self) -> bool:
        changed = [index for index, known in enumerate(self._hashes) if not known]
        for index in changed:
            self.chunk_hash(index)
        return bool(changed)

    # -- snapshot chunks -----------------------------------------------------------------------------------------------

    def read_chunk(self, index: int) -> bytes:
        """One chunk's values and its part of the applied set, of one moment, for a newcomer."""
        with self.lock:
            values = self.layout.chunks[index].of(self.basepoint).clone()
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
            chunk.of(self.basepoint).copy_(values)
            self._bounds[index] = largest
            self._hashes[index] = b""


def _largest(values: Tensor) -> float:
    """Largest |value|; the two ends rather than abs(), since the absolute value of the least int32 is itself."""
    low, high = torch.aminmax(values)
    return max(-low.item(), high.item())
