"""Peers in one process: everything of a real swarm but sockets, threads and gossip.

Enters: a run's manifest and start weights, one trainer per peer. Leaves: trained peers, and the basepoint that they share.
Each peer has its own trainer, replica, exchange, log and Ed25519 key; packets are made, signed, checked and applied by the classes that
production runs. All peers step in turn, so that a run is a function of its seed alone. Every `publish_every_steps` steps they meet:

    receive what the others published at the meeting before (a lag of one interval: the time that a packet is on its way)
    publish own work, with the true share 1 / P
    count the swarm's batches, which drive the rate, as packets tell them

One interval of lag is the slowest link that this cadence allows; a faster link only helps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from blake3 import blake3

from tscale_fed.trainer import Trainer
from tscale_net.identity import Identity, verify
from tscale_net.ports import Clock
from tscale_peers.assembly import RunTerms
from tscale_peers.exchange import Exchange, Signer
from tscale_peers.packet import Packet
from tscale_peers.packet_log import MemoryLog

STREAM = 1
"""Every peer has one home directory, so one author stream."""
KEY_DOMAIN = "tscale-fed/bench-key/1"


class Member:
    """One peer."""

    def __init__(self, run: RunTerms, start: torch.Tensor, trainer: Trainer, clock: Clock) -> None:
        """`start`: float32 [parameters] on the run's grid; the trainer's weights are set to it."""
        identity = Identity.from_seed(blake3(f"{KEY_DOMAIN}|{trainer.peer_id}".encode()).digest())
        self.trainer = trainer
        self.replica = run.new_replica()
        self.replica.set_start(start)
        signer = Signer(identity.public_key, identity.sign)
        self.exchange = Exchange(self.replica, trainer.weights, run.rule(), signer, STREAM, MemoryLog(), run.terms, clock)
        self._terms = run.terms

    def step(self) -> None:
        """One local step. Raises Refused as `Trainer.step`."""
        self.trainer.step()
        self.exchange.mark_trained()

    def receive(self, bodies: Sequence[bytes]) -> None:
        """Check and apply packets of others. Raises Refused if one is refused: nobody here lies, so it is an error of the run."""
        packets = [Packet.open(body, self._terms, verify) for body in bodies]
        for receipt in self.exchange.receive(packets):
            if receipt.refusal is not None:
                raise receipt.refusal
        others = sum(self.replica.applied.batches.values()) - self.replica.applied.batches.get(self.exchange.stream_key, 0)
        self.trainer.tell_swarm_batches(others + self.trainer.steps)

    def publish(self, share: float) -> list[bytes]:
        """Own packets, applied here. Raises Refused as `Exchange.publish`."""
        published = self.exchange.publish(self.trainer.steps, share)
        self.trainer.scale_momentum(published.momentum_keep)
        # There is no crash to recover from here: the log need not keep what a checkpoint would lack.
        self.exchange.checkpointed()
        return published.packets


class InProcessSwarm:
    """See the module."""

    def __init__(self, run: RunTerms, start: torch.Tensor, trainers: Sequence[Trainer], clock: Clock) -> None:
        """`trainers`: at step 0, each with a peer id of its own."""
        self.members = [Member(run, start, trainer, clock) for trainer in trainers]
        self.sent_bytes = 0
        """By one peer, to one other, so far. Packets of a run have one size up to the length of their numbers."""
        self.exchanges = 0
        self._every = run.manifest.publish_every_steps
        self._under_way: list[list[bytes]] = [[] for _ in trainers]
        self._steps = 0

    def step(self) -> None:
        """One step of every peer, and a meeting if it is due. Raises Refused: a loss that is not finite, a displacement out of range."""
        for member in self.members:
            member.step()
        self._steps += 1
        if self._steps % self._every == 0:
            self._meet()

    def basepoint(self) -> torch.Tensor:
        """B as the first peer holds it: float32 [parameters] on the CPU, a copy."""
        return self.members[0].replica.weights()

    def settle(self) -> None:
        """Deliver what is under way; publish nothing.

        Raises AssertionError if replicas differ afterwards: the rule promises that they do not.
        """
        self._deliver()
        self._under_way = [[] for _ in self.members]
        states = {member.replica.state() for member in self.members}
        if len(states) != 1:
            raise AssertionError(f"{len(states)} different (digest, hash) pairs after everything was delivered")

    @property
    def received_bytes(self) -> int:
        """By one peer, from all others, so far published."""
        return self.sent_bytes * (len(self.members) - 1)

    def _meet(self) -> None:
        self._deliver()
        share = 1.0 / len(self.members)
        self._under_way = [member.publish(share) for member in self.members]
        self.sent_bytes += sum(len(body) for body in self._under_way[0])
        self.exchanges += 1

    def _deliver(self) -> None:
        for at, member in enumerate(self.members):
            member.receive([body for author, bodies in enumerate(self._under_way) if author != at for body in bodies])
