"""The running average: the time mean of the basepoint, the same bits on all peers that hold the same packets.

Enters: packets as they are applied, the replica at certain moments. Leaves: the mean basepoint of the last whole window, as integers.
Time is cut at fixed Unix moments, `cuts` of them in a window of `window_s` seconds. The mean of a window is

    (sum over its cuts of B at the cut) / cuts          B at the cut: start weights and every packet that its author dates at or before it

The date is the author's signed word, so every peer puts a packet on the same side of every cut, however late it arrives: sums commute, and
equal sets of packets give equal means. What this peer does at a cut is to add B as it stands, take out again the packets that are dated
later, and add to cuts that are past those that arrive later. (A mean of iterates needs no decayed rate: Polyak and Juditsky 1992; TScale
tests and ships such means of its basepoints.)
A window during whose time this peer replaced parts of B by a donor's snapshot has no mean here: the next one has.
Two int64 sums are kept, 16 bytes per weight, beside the basepoint or, at a price in time, in host memory.
Not thread-safe: it belongs to whoever applies packets.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from blake3 import blake3
from torch import Tensor

from tscale_peers import limits
from tscale_peers.basepoint import Replica
from tscale_peers.errors import refuse
from tscale_peers.packet import Key, Packet

Read = Callable[[Key], Packet | None]
"""A packet that was applied, read back; None if it is not kept any more."""


class RunningAverage:
    """One replica's mean. `window_s`, `cuts`: of the run, the same for all. `read`: the delta log. device: of the sums; None: that of B."""

    def __init__(self, replica: Replica, window_s: float, cuts: int, read: Read, device: torch.device | None = None) -> None:
        if not (window_s > 0 and cuts >= 1):
            raise ValueError(f"a window of {window_s} s with {cuts} cuts means nothing")
        self.cuts = cuts
        self.cut_s = window_s / cuts
        self.finished_window: int | None = None
        """Which window `finished` is the sum of."""
        self._replica = replica
        self._read = read
        self._next_cut: int | None = None
        """Cuts are numbered from 1970. None: none was due yet."""
        self._valid_from = 0
        """First cut that this peer's B can be trusted for."""
        self._sum = torch.zeros(replica.layout.size, dtype=torch.int64, device=device or replica.device)
        self._finished = torch.zeros_like(self._sum)
        self._ahead: dict[Key, int] = {}
        """Packets in B dated after the next cut, with the first cut that they belong to."""
        self._overflowed = False

    # -- what happens to the replica ---------------------------------------------------------------------------------

    def applied(self, packet: Packet) -> None:
        """A packet has just been added to B."""
        first = self._first_cut(packet)
        if self._next_cut is None:
            return
        if first > self._next_cut:
            self._remember_ahead(packet.key, first)
        window = self._next_cut // self.cuts
        self._add(self._sum, packet, max(0, self._next_cut - max(first, window * self.cuts)))
        if self.finished_window is not None:
            end = (self.finished_window + 1) * self.cuts
            self._add(self._finished, packet, max(0, end - max(first, self.finished_window * self.cuts)))

    def replaced(self) -> None:
        """Parts of B came as a snapshot: what they contained at past cuts is not known here."""
        if self._next_cut is not None:
            self._valid_from = self._next_cut + 1
        self.finished_window = None

    def take_due_cuts(self, wall_s: float) -> bool:
        """Take the cuts that are past at `wall_s` (Unix time); True if a window was finished. After a long absence those of windows that
        nobody asks for any more are left out."""
        newest = math.floor(wall_s / self.cut_s)
        if self._next_cut is None:
            # One cut later: what a snapshot contained may be dated a little ahead, and its dates are not known here.
            self._next_cut, self._valid_from = newest + 1, newest + 2
            return False
        if self._next_cut <= newest // self.cuts * self.cuts - self.cuts:
            self._begin(newest // self.cuts * self.cuts - self.cuts)
        finished = False
        while self._next_cut <= newest:
            finished |= self._take()
        return finished

    def _begin(self, cut: int) -> None:
        self._sum.zero_()
        self._next_cut = cut

    def _take(self) -> bool:
        """One cut. True if it was the last of its window."""
        cut = self._next_cut
        assert cut is not None
        with self._replica.lock:
            self._sum.add_(self._replica.basepoint.to(self._sum.device))
        for key in [key for key, first in self._ahead.items() if first <= cut]:
            del self._ahead[key]
        for key in self._ahead:
            packet = self._read(key)
            if packet is None:
                self._overflowed = True
            else:
                self._add(self._sum, packet, -1)
        self._next_cut = cut + 1
        return self._next_cut % self.cuts == 0 and self._finish(cut // self.cuts)

    def _finish(self, window: int) -> bool:
        whole = self._valid_from <= window * self.cuts and not self._overflowed
        if whole:
            self._finished, self._sum = self._sum, self._finished
            self.finished_window = window
        self._overflowed = len(self._ahead) >= limits.average_ahead_packets
        self._sum.zero_()
        return whole

    # -- the mean ----------------------------------------------------------------------------------------------------

    def weights(self) -> Tensor | None:
        """Mean of the last whole window in weight units, fp32 [layout.size] on the CPU; None if there is none yet."""
        if self.finished_window is None:
            return None
        flat = torch.empty(self._replica.layout.size, dtype=torch.float32)
        for chunk in self._replica.layout.chunks:
            for s in chunk.segments:
                units = chunk.of(self._finished)[s.start : s.stop].to("cpu", torch.float64)
                chunk.of(flat)[s.start : s.stop].copy_(units.mul_(s.unit / self.cuts))
        return flat

    def hash(self) -> bytes:
        """32 bytes over the finished sum (int64, little-endian) and its window's number; b"" if there is none."""
        if self.finished_window is None:
            return b""
        hasher = blake3(self.finished_window.to_bytes(8, "little"))
        for chunk in self._replica.layout.chunks:
            hasher.update(chunk.of(self._finished).cpu().numpy().astype("<i8", copy=False).tobytes())
        return hasher.digest()

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """(tensors, facts) that belong to the replica's state of the same moment; copies."""
        facts = {"next_cut": -1 if self._next_cut is None else self._next_cut, "valid_from": self._valid_from}
        facts["finished_window"] = -1 if self.finished_window is None else self.finished_window
        facts["complete"] = int(not self._overflowed and not self._ahead)
        return {"average_sum": self._sum.to("cpu", copy=True), "average_finished": self._finished.to("cpu", copy=True)}, facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, int]) -> None:
        """Continue from `state`, together with the replica of that moment. Raises Refused("bad-checkpoint")."""
        shape = (self._replica.layout.size,)
        sums = (tensors["average_sum"], tensors["average_finished"])
        if any(values.shape != shape or values.dtype != torch.int64 for values in sums):
            raise refuse("bad-checkpoint", "the checkpoint's running average does not fit this run")
        self._sum, self._finished = (values.to(self._sum.device) for values in sums)
        self._next_cut = None if facts["next_cut"] < 0 else facts["next_cut"]
        self._valid_from = facts["valid_from"]
        self.finished_window = None if facts["finished_window"] < 0 else facts["finished_window"]
        self._overflowed = not facts["complete"]

    # -- inside ------------------------------------------------------------------------------------------------------

    def _first_cut(self, packet: Packet) -> int:
        return math.ceil(packet.header.created_unix / self.cut_s)

    def _remember_ahead(self, key: Key, first: int) -> None:
        if len(self._ahead) >= limits.average_ahead_packets:
            self._overflowed = True
        else:
            self._ahead[key] = first

    def _add(self, sums: Tensor, packet: Packet, times: int) -> None:
        """sums += times * c*q."""
        if times == 0:
            return
        chunk = self._replica.layout.chunks[packet.chunk]
        moved = torch.zeros(chunk.size, dtype=torch.int32, device=self._replica.device)
        packet.delta.add_to(moved)
        chunk.of(sums).add_(moved.to(sums.device), alpha=times)
