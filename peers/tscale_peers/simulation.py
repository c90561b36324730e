"""A whole swarm in virtual time: the very classes that production runs, on a network in memory.

Enters: a seed, the number of peers, what happens to them. Leaves: peers to look at, and a trace hash that is the same for the same seed.
Peers train by scripted moves unless the caller brings a learner (simulated_training.py); their signatures are a keyed hash unless it asks
for real ones. What a process and its home keep or lose in a crash is as in production: memory is gone; log and checkpoint stay.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from blake3 import blake3
from torch import Tensor

from tscale_net.errors import Refused
from tscale_net.identity import Identity
from tscale_net.memory_network import MemoryNetwork
from tscale_net.ports import Clock, Rng
from tscale_net.stall import Stall, StallingClock
from tscale_net.transfer import Transfers
from tscale_peers import limits
from tscale_peers.applied import AppliedSet
from tscale_peers.assembly import RunTerms, Saved, assemble
from tscale_peers.basepoint import Replica
from tscale_peers.donor import TRAINER_STATE, provide_from
from tscale_peers.joining import fetch_snapshot, learn_run, reload_when_needed
from tscale_peers.layout import TensorSpec
from tscale_peers.manifest import RuleSpec, RunManifest
from tscale_peers.meeting import Progress
from tscale_peers.notices import Notice, NoticeBoard
from tscale_peers.packet_log import MemoryLog, PacketLog
from tscale_peers.peer import Outside, PeerSettings, SwarmPeer
from tscale_peers.restart import PrivateWork, is_caught_up, own_batches, settle_after_crash
from tscale_peers.simulated_peer import (
    TOY,
    Checkpoint,
    Conditions,
    Signatures,
    SimulatedHome,
    SimulatedPeer,
    SlowLog,
    ToyAuthor,
    toy_verify,
)
from tscale_peers.simulated_training import Learner, ScriptedMoves

__all__ = ["SimulatedPeer", "SimulatedSwarm", "ToyAuthor", "small_run", "toy_verify"]

UNIT_EXPONENT = -20
STREAM_BITS = 63
CATCH_UP_S = 60.0
"""A peer that comes back trains on after this at the latest, caught up or not."""
DONOR_STATE_MAX_BYTES = 1 << 30
JOIN_LOOK_S = 0.1
"""Whether a newcomer has its snapshot is looked at this often."""

NewLearner = Callable[[SimulatedPeer, Tensor], Learner]
"""(peer, start weights, to be taken over) -> what trains it."""


def small_run(
    publish_every_steps: int = 5,
    chunk_params: int = 1 << 11,
    rule: RuleSpec | None = None,
    codec: str = "sign",
    spread: Literal["auto", "flood", "owners"] = "auto",
) -> tuple[RunManifest, torch.Tensor]:
    """A run of 4096 weights, by default in two chunks, and its start weights."""
    specs = [TensorSpec("embedding", 16, 128, UNIT_EXPONENT), TensorSpec("final", 16, 128, UNIT_EXPONENT)]
    start = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * 0.5
    manifest = RunManifest(
        name="simulated",
        tensors=specs,
        start_hash=b"\x00" * 32,
        created_unix=0.0,
        trainer={},
        codec=codec,
        chunk_params=chunk_params,
        publish_every_steps=publish_every_steps,
        rule=rule or RuleSpec(),
        spread=spread,
    )
    run = RunTerms.of(manifest)
    replica = run.new_replica()
    replica.set_start(start)
    return RunManifest.decode(manifest.encode()), replica.weights()


class SimulatedSwarm:
    """Builds peers on one MemoryNetwork. All of it runs on a VirtualLoop (tscale_net.virtual_time.run_virtual).

    latency_s, jitter_s: one way, see MemoryNetwork. checkpoint_s: how often each peer saves its state to its home; 0: never.
    """

    def __init__(
        self,
        manifest: RunManifest,
        start: Tensor,
        clock: Clock,
        rng: Rng,
        *,
        latency_s: float = 0.04,
        jitter_s: float = 0.01,
        bandwidth_bytes_s: float | None = None,
        new_log: Callable[[], PacketLog] = MemoryLog,
        new_learner: NewLearner | None = None,
        signatures: Signatures = TOY,
        checkpoint_s: float = 0.0,
    ) -> None:
        self.run = RunTerms.of(manifest)
        self.start = start
        self.clock = clock
        self.rng = rng
        self.network = MemoryNetwork(
            random.Random(rng.random()), clock, latency_s=latency_s, jitter_s=jitter_s, bandwidth_bytes_s=bandwidth_bytes_s
        )
        self.peers: list[SimulatedPeer] = []
        self.on_published: Callable[[SimulatedPeer], None] = lambda sim: None
        """Called whenever a peer has published."""
        self._signatures = signatures
        self._checkpoint_s = checkpoint_s
        self._new_log = new_log
        self._new_learner = new_learner or (lambda sim, weights: ScriptedMoves(weights, sim.seed))
        self._trace = blake3()

    def add(self, step_s: float = 1.0, listens: bool = True, conditions: Conditions | None = None) -> SimulatedPeer:
        """A new identity with an empty home; not running yet. `step_s` and `listens`: short for the conditions of these two."""
        n = len(self.peers)
        identity = Identity.from_seed(blake3(f"peer {n}".encode()).digest())
        conditions = conditions or Conditions(step_s, listens)
        stall = Stall(self.clock) if conditions.can_stall else None
        slow = stall is not None and conditions.disk_s > 0
        log = SlowLog(limits.log_default_retain, stall, conditions.disk_s) if slow and stall is not None else self._new_log()
        home = SimulatedHome(log, self.rng.getrandbits(STREAM_BITS))
        author = self._signatures.author(identity)
        sim = SimulatedPeer(identity, author, f"peer-{n}", n, conditions, home, stall, conditions.step_s)
        self.peers.append(sim)
        return sim

    # -- starting ----------------------------------------------------------------------------------------------------

    async def found(self, sim: SimulatedPeer, role: str = "seed") -> str:
        """Start `sim` with the start weights; returns the address to join at."""
        replica = self.run.new_replica()
        replica.set_start(self.start)
        return await self._launch(sim, role, (), replica=replica, joined=True)

    async def join(self, sim: SimulatedPeer, *bootstrap: str) -> None:
        """Start `sim` without a basepoint: it knows only addresses (and its home's log). Manifest, snapshot, then packets."""
        await self._launch(sim, "peer", bootstrap, replica=self.run.new_replica(), joined=False)
        assert sim.peer is not None and sim.task is not None
        while sim.peer.gossip.hold:
            await self.clock.sleep(JOIN_LOOK_S)
            if sim.task.done() and not sim.task.cancelled():
                sim.task.result()
            if sim.task.done():
                return

    async def restart(self, sim: SimulatedPeer, *bootstrap: str, role: str = "peer") -> str:
        """Start a killed peer from its home again; without a checkpoint it joins anew, or is a seed that begins at the start weights.

        Raises Refused, or a group of one if it fails later, as `join` does."""
        saved = sim.home.checkpoint
        if saved is None and role != "seed":
            await self.join(sim, *bootstrap)
            return ""
        replica = self.run.new_replica()
        if saved is None:
            replica.set_start(self.start)
        else:
            applied = AppliedSet.decode(saved.applied, replica.applied.chunks, replica.applied.max_streams)
            replica.restore(saved.basepoint.clone(), applied)
        return await self._launch(sim, role, bootstrap, replica=replica, joined=True, saved=saved)

    async def _launch(
        self,
        sim: SimulatedPeer,
        role: str,
        bootstrap: tuple[str, ...],
        *,
        replica: Replica,
        joined: bool,
        saved: Checkpoint | None = None,
    ) -> str:
        known_run = self.run.run if joined else b""
        sim.killed, sim.stepped_at, sim.task = False, None, None
        sim.started_at = self.clock.now()
        sim.lives += 1
        place = sim.conditions
        transport = self.network.transport(
            sim.identity, sim.name, known_run, listens=place.listens, line=place.line, stall=sim.stall, clock_ahead_s=place.clock_ahead_s
        )
        rng = random.Random(self.rng.random())
        clock: Clock = self.clock
        if sim.stall is not None or place.clock_ahead_s:
            clock = StallingClock(self.clock, sim.stall or Stall(self.clock), place.clock_ahead_s)
        outside = Outside(transport, Transfers(transport, clock, rng), clock, rng, self._signatures.verify)
        addresses = tuple(await transport.start())
        if not joined:
            await learn_run(outside, bootstrap)
        board = NoticeBoard(self.clock, partial(self._note, sim))
        learner = sim.learner = self._new_learner(sim, self.start.clone())
        private = None
        if saved is not None:
            learner.load(saved.learner)
            sim.steps = saved.steps
            private = saved.private._replace(displacement=saved.private.displacement.clone())
        peer = assemble(
            self.run, sim.author, outside, replica=replica, weights=learner.weights, log=sim.home.log, stream=sim.home.stream,
            settings=PeerSettings(sim.name, role, bootstrap, addresses), board=board, joined=joined, saved=private,
            pledge_log=sim.home.pledges,
        )  # fmt: skip
        sim.peer = peer
        settle_after_crash(peer.meeting, sim.steps if saved is not None else 0, saved.private.displacement if saved is not None else None)
        peer.meeting.resume_at(Progress(sim.steps, sim.steps, sim.steps * learner.tokens_per_step, float("nan"), trained=False))
        outside.transfers.serve(
            provide_from(peer, self.run.manifest.encode(), len(self.run.terms.layout.chunks), learner.donor_state, _nothing)
        )
        sim.task = asyncio.get_running_loop().create_task(self._live(sim, peer, learner, joined, saved))
        return addresses[0] if addresses else ""

    async def _live(self, sim: SimulatedPeer, peer: SwarmPeer, learner: Learner, joined: bool, saved: Checkpoint | None) -> None:
        begun = self.clock.now()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(peer.run())
            if sim.conditions.stall_s > 0:
                tasks.create_task(self._stalls(sim))
            reload_when_needed(peer, self.run.manifest, tasks)
            if not joined:
                await fetch_snapshot(peer, self.run.manifest)
                learner.joined(await self._statistics(peer), peer.swarm_batches())
            elif saved is not None and peer.settings.bootstrap:
                await self._catch_up(peer, saved)
            sim.caught_up_after_s.append(self.clock.now() - begun)
            tasks.create_task(self._train(sim, peer, learner))

    async def _statistics(self, peer: SwarmPeer) -> bytes | None:
        try:
            return await peer.outside.transfers.fetch(TRAINER_STATE, sorted(peer.linked), max_bytes=DONOR_STATE_MAX_BYTES)
        except Refused:
            return None

    async def _catch_up(self, peer: SwarmPeer, saved: Checkpoint) -> None:
        work = PrivateWork(saved.swarm_batches, own_batches(peer), self.run.manifest.limits.displacement_max_age_batches)
        begun = self.clock.now()
        while not is_caught_up(peer) and self.clock.now() - begun < CATCH_UP_S:
            await self.clock.sleep(limits.tick_s)
        peer.meeting.settle()
        if is_caught_up(peer):
            work.judge(peer)

    # -- living ------------------------------------------------------------------------------------------------------

    async def _train(self, sim: SimulatedPeer, peer: SwarmPeer, learner: Learner) -> None:
        clock, meeting = peer.outside.clock, peer.meeting
        peer.training_active = True
        sim.stepped_at = save_at = self.clock.now()
        while sim.step_s > 0 and peer.training_active:
            await clock.sleep(sim.step_s)
            if not peer.training_active:
                return
            loss = learner.step()
            sim.steps += 1
            sim.total_steps += 1
            met = meeting.meet(Progress(sim.steps, sim.steps, sim.steps * learner.tokens_per_step, loss, trained=True))
            learner.met(met.momentum_keep, peer.others_batches())
            now = self.clock.now()
            sim.longest_gap_s = max(sim.longest_gap_s, now - sim.stepped_at)
            sim.stepped_at = now
            if met.published or met.given_bytes:
                sim.published += 1
                self.on_published(sim)
            if self._checkpoint_s and now - save_at >= self._checkpoint_s:
                save_at = now
                self.save(sim)

    def save(self, sim: SimulatedPeer) -> None:
        """A checkpoint of a running peer into its home."""
        peer, learner = sim.peer, sim.learner
        assert peer is not None and learner is not None
        meeting = peer.meeting
        assert meeting.summing is not None
        exchange, replica = meeting.exchange, meeting.replica
        private = Saved(exchange.displacement().clone(), exchange.paid.encode(), exchange.pledges.encode(), meeting.summing.sums.encode())
        sim.home.checkpoint = Checkpoint(
            replica.basepoint.clone(), replica.applied.encode(), private, sim.steps, peer.swarm_batches(), learner.save()
        )
        meeting.checkpointed(private.paid, private.pledges)

    async def _stalls(self, sim: SimulatedPeer) -> None:
        assert sim.stall is not None
        while True:
            await self.clock.sleep(sim.conditions.stall_every_s * (0.5 + self.rng.random()))
            sim.stall.hold(sim.conditions.stall_s)

    # -- what happens to it ------------------------------------------------------------------------------------------

    def kill(self, sim: SimulatedPeer, silent: bool = False) -> None:
        """SIGKILL: everything in memory is gone, connections are reset. `silent`: as a power cut, nobody is told."""
        sim.killed = True
        if sim.task is not None:
            sim.task.add_done_callback(_how_it_ended)
            sim.task.cancel()
        self.network.kill(sim.author.peer_id, silent)

    def stand_still(self) -> None:
        """All stop training (and so publishing); gossip goes on."""
        for sim in self.peers:
            if sim.peer is not None:
                sim.peer.training_active = False

    async def quiesce(self, most_s: float = 120.0) -> float:
        """Wait until all living peers hold equal applied sets. Returns the virtual seconds it took; raises TimeoutError."""
        begin = self.clock.now()
        while self.clock.now() - begin < most_s:
            if len({p.meeting.settle()[0] for p in self.living()}) == 1:
                return self.clock.now() - begin
            await self.clock.sleep(0.5)
        raise TimeoutError(f"applied sets still differ after {most_s} s: " + ", ".join(p.state[0].hex()[:6] for p in self.living()))

    def living(self) -> list[SwarmPeer]:
        """Running peers. A peer that ended by a fault raises that fault here: a simulation must not go on without it."""
        for sim in self.peers:
            if sim.task is not None and not sim.killed and sim.task.done():
                sim.task.result()
        return [sim.peer for sim in self.peers if sim.alive and sim.peer is not None]

    def addresses(self, but: SimulatedPeer | None = None) -> Sequence[str]:
        """Where living peers can be dialled."""
        return [a for sim in self.peers if sim is not but and sim.alive and sim.peer is not None for a in sim.peer.settings.addresses]

    async def end(self) -> None:
        """Cancel everything."""
        tasks = [sim.task for sim in self.peers if sim.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def trace(self) -> str:
        """Hash of all notices so far with their virtual times, and of all states: equal for equal seeds."""
        trace = self._trace.copy()
        for peer in self.living():
            trace.update(b"".join(peer.meeting.settle()))
        return trace.hexdigest()

    def _note(self, sim: SimulatedPeer, notice: Notice) -> None:
        sim.notices.append(notice)
        self._trace.update(f"{notice.at:.6f} {sim.name} {notice.kind} {notice.text}\n".encode())


def _how_it_ended(task: asyncio.Task[None]) -> None:
    """What a killed process ran into while it died is nobody's business; asyncio wants somebody to have looked."""
    if not task.cancelled():
        task.exception()


async def _nothing(name: str) -> None:
    return None
