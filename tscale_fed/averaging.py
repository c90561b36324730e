"""The running average of a peer: whether there is one, what it and the basepoint are worth, and the best model so far on disk.

Enters: the run, the replica, what the last checkpoint kept. Leaves: a `RunningAverage` that hears of every change of the basepoint; in the
home, under `best`, the weights with the lowest held-out loss that this peer has measured.
"""

from __future__ import annotations

import math

import psutil
import torch
from torch import Tensor

from tscale_fed.checkpoint import Checkpoint, CheckpointStore
from tscale_fed.engine.engine import free_bytes
from tscale_fed.home import Home
from tscale_peers.assembly import RunTerms
from tscale_peers.average import RunningAverage
from tscale_peers.basepoint import Replica
from tscale_peers.packet import Key, Packet
from tscale_peers.packet_log import PacketLog

AVERAGE_BYTES_PER_WEIGHT = 16
FREE_MEMORY_PART = 0.25
"""An average is kept if it takes at most this part of the memory that is free at the start, of the device that has the basepoint: in other
memory every packet would cross the bus while training waits."""
_FACTS_PREFIX = "average_"


def has_room(weights: int, device: torch.device) -> bool:
    """Is the memory of the basepoint's device large enough for an average of so many weights too?"""
    on_device = free_bytes(device)
    free = psutil.virtual_memory().available if on_device is None else on_device
    return weights * AVERAGE_BYTES_PER_WEIGHT <= FREE_MEMORY_PART * free


def average_of(run: RunTerms, replica: Replica, log: PacketLog, checkpoint: Checkpoint | None) -> RunningAverage:
    """Watches `replica` from now on, and goes on from the checkpoint that the replica was restored from.

    Raises Refused("bad-checkpoint") if its sums are of another model.
    """

    def read(key: Key) -> Packet | None:
        body = log.get(key)
        return None if body is None else Packet.decode(body, run.terms)

    manifest = run.manifest
    device = replica.device if has_room(replica.layout.size, replica.device) else torch.device("cpu")
    average = RunningAverage(replica, manifest.average_window_s, manifest.average_cuts, read, device)
    if checkpoint is not None and "average_sum" in checkpoint.tensors:
        facts = {name.removeprefix(_FACTS_PREFIX): value for name, value in checkpoint.facts.items() if name.startswith(_FACTS_PREFIX)}
        average.restore(checkpoint.tensors, facts)
    replica.watcher = average
    return average


def saved_average(average: RunningAverage | None) -> tuple[dict[str, Tensor], dict[str, int]]:
    """(tensors, facts) for a checkpoint of the replica at the same moment."""
    if average is None:
        return {}, {}
    tensors, facts = average.state()
    return tensors, {_FACTS_PREFIX + name: value for name, value in facts.items()}


class BestModel:
    """The best weights that were measured, as one checkpoint under `best` in the home."""

    def __init__(self, home: Home, run: str) -> None:
        """`run`: hex id; what another run left there does not count."""
        self._store = CheckpointStore(home.path / "best", keep=1)
        self._run = run
        self.loss = self._loss_on_disk()

    def _loss_on_disk(self) -> float:
        checkpoint, _ = self._store.latest()
        if checkpoint is None or checkpoint.facts.get("run") != self._run:
            return math.inf
        return float(checkpoint.facts["loss"])

    def offer(self, weights: Tensor, loss: float, what: str, own_steps: int, batches: int) -> bool:
        """Keep these weights (fp32 flat) if they are better than the ones kept. Raises Refused of CheckpointStore.save."""
        if not loss < self.loss:
            return False
        facts = {"run": self._run, "loss": loss, "what": what, "swarm_batches": batches}
        self._store.save(own_steps, {"weights": weights}, {}, facts)
        self.loss = loss
        return True
