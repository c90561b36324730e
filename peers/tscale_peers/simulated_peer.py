"""One simulated peer: who it is, what its machine and line are like, what its home keeps over a crash.

Enters: a number, conditions. Leaves: a `SimulatedPeer` that `SimulatedSwarm` starts, kills and starts again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3
from torch import Tensor

from tscale_net.identity import Identity, verify
from tscale_net.memory_link import Line
from tscale_net.ports import PeerId
from tscale_net.stall import Stall
from tscale_peers.assembly import Saved
from tscale_peers.delta_log import PacketLog
from tscale_peers.notices import Notice
from tscale_peers.packet import Key
from tscale_peers.packet_log import MemoryLog
from tscale_peers.peer import SwarmPeer
from tscale_peers.records import SIGNATURE_BYTES, Verify
from tscale_peers.simulated_training import Learner
from tscale_peers.surroundings import Author


class ToyAuthor:
    """A real identity with a quick stand-in for its signature: Ed25519 would take most of the time of a large simulation."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.peer_id: PeerId = identity.peer_id
        self.public_key: bytes = identity.public_key

    def sign(self, domain: bytes, message: bytes) -> bytes:
        return _toy_signature(self.public_key, domain, message)


class Unsigned(ToyAuthor):
    """Signs with a hash that nobody checks: for simulations without liars. (Its bits choose who tells whom, as a signature's do.)"""

    def sign(self, domain: bytes, message: bytes) -> bytes:
        return blake3(message).digest(SIGNATURE_BYTES)


def _toy_signature(public_key: bytes, domain: bytes, message: bytes) -> bytes:
    return blake3(domain + b"\x00" + message, key=public_key).digest(64)


def toy_verify(public_key: bytes, domain: bytes, message: bytes, signature: bytes) -> bool:
    """Counterpart of `ToyAuthor.sign`: detects any change, not forgery."""
    return len(public_key) == 32 and signature == _toy_signature(public_key, domain, message)


@dataclass(frozen=True, slots=True)
class Signatures:
    """How peers of a simulation sign and check."""

    author: Callable[[Identity], Author]
    verify: Verify


NONE = Signatures(Unsigned, lambda public_key, domain, message, signature: True)
TOY = Signatures(ToyAuthor, toy_verify)
REAL = Signatures(lambda identity: identity, verify)


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a peer's machine and line are like."""

    step_s: float = 1.0
    """A step takes so long; 0: it never trains."""
    listens: bool = True
    """Others can dial it."""
    line: Line | None = None
    """None: the network's usual line."""
    clock_ahead_s: float = 0.0
    disk_s: float = 0.0
    """The process stands still for so long whenever it writes a packet to its log."""
    stall_every_s: float = 0.0
    stall_s: float = 0.0
    """Now and then it stands still for so long, whatever it is doing; 0: never."""

    @property
    def can_stall(self) -> bool:
        return self.disk_s > 0 or self.stall_s > 0


@dataclass(slots=True)
class Checkpoint:
    """What a home keeps of one moment."""

    basepoint: Tensor
    applied: bytes
    private: Saved
    steps: int
    swarm_batches: int
    learner: Any


@dataclass(slots=True)
class SimulatedHome:
    """What survives a crash."""

    log: PacketLog
    stream: int
    pledges: PacketLog = field(default_factory=MemoryLog)
    """Contributions given to owners of chunks."""
    checkpoint: Checkpoint | None = None


class SlowLog(MemoryLog):
    """A log on a slow disk: the process waits for every write."""

    def __init__(self, retain_per_stream: int, stall: Stall, write_s: float) -> None:
        super().__init__(retain_per_stream)
        self._stall = stall
        self._write_s = write_s

    def append(self, body: bytes, key: Key, fsync: bool = False) -> bool:
        self._stall.hold(self._write_s)
        return super().append(body, key, fsync)


@dataclass
class SimulatedPeer:
    """One peer and, while it runs, what runs of it."""

    identity: Identity
    author: Author
    name: str
    seed: int
    conditions: Conditions
    home: SimulatedHome
    stall: Stall | None
    step_s: float
    """As in `conditions`; may be changed while it runs."""
    peer: SwarmPeer | None = None
    learner: Learner | None = None
    steps: int = 0
    """As training counts them: a crash takes back what no checkpoint has."""
    total_steps: int = 0
    """Of all lives, lost ones included."""
    published: int = 0
    started_at: float = 0.0
    """When this life began."""
    stepped_at: float | None = None
    """When this life's newest step ended."""
    longest_gap_s: float = 0.0
    """Longest time between two steps of one life."""
    task: asyncio.Task[None] | None = None
    killed: bool = False
    lives: int = 0
    caught_up_after_s: list[float] = field(default_factory=list)
    """How long each join or return took until training began."""
    notices: list[Notice] = field(default_factory=list)

    @property
    def log(self) -> PacketLog:
        return self.home.log

    @property
    def alive(self) -> bool:
        return self.task is not None and not self.killed and not self.task.done()

    @property
    def is_training(self) -> bool:
        return self.alive and self.stepped_at is not None
