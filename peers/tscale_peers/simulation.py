"""A whole swarm in virtual time: the very classes that production runs, on a network in memory.

Enters: a seed, the number of peers, what happens to them. Leaves: peers to look at, and a trace hash that is the same for the same seed.
Each simulated peer trains by scripted moves (seeded noise around a common drift), so what is checked is the algebra, not learning.
Signatures are a keyed hash here (`toy_verify`): Ed25519 would take most of the time and adds nothing to order, loss and duplication.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from blake3 import blake3

from tscale_net.identity import Identity
from tscale_net.memory_network import MemoryNetwork
from tscale_net.ports import Clock, PeerId, Rng
from tscale_net.transfer import Transfers
from tscale_peers.assembly import RunTerms, assemble
from tscale_peers.basepoint import Replica
from tscale_peers.delta_log import MemoryLog, PacketLog
from tscale_peers.donor import provide_from
from tscale_peers.joining import fetch_snapshot, learn_run, reload_when_needed
from tscale_peers.layout import TensorSpec
from tscale_peers.manifest import RuleSpec, RunManifest
from tscale_peers.meeting import Progress
from tscale_peers.notices import Notice, NoticeBoard
from tscale_peers.peer import Outside, PeerSettings, SwarmPeer

UNIT_EXPONENT = -20
STEP_TOKENS = 1000
DRIFT = 0.001
NOISE = 0.01


@dataclass(frozen=True, slots=True)
class ToyAuthor:
    """A real identity with a quick stand-in for its signature."""

    identity: Identity

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    @property
    def public_key(self) -> bytes:
        return self.identity.public_key

    def sign(self, domain: bytes, message: bytes) -> bytes:
        return _toy_signature(self.public_key, domain, message)


def _toy_signature(public_key: bytes, domain: bytes, message: bytes) -> bytes:
    return blake3(domain + b"\x00" + message, key=public_key).digest(64)


def toy_verify(public_key: bytes, domain: bytes, message: bytes, signature: bytes) -> bool:
    """Counterpart of `ToyAuthor.sign`: detects any change, not forgery."""
    return len(public_key) == 32 and signature == _toy_signature(public_key, domain, message)


def small_run(publish_every_steps: int = 5, chunk_params: int = 1 << 11, rule: RuleSpec | None = None) -> tuple[RunManifest, torch.Tensor]:
    """A run of 4096 weights in two chunks, and its start weights."""
    specs = [TensorSpec("embedding", 16, 128, UNIT_EXPONENT), TensorSpec("final", 16, 128, UNIT_EXPONENT)]
    start = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * 0.5
    manifest = RunManifest(
        name="simulated",
        tensors=specs,
        start_hash=b"\x00" * 32,
        created_unix=0.0,
        trainer={},
        chunk_params=chunk_params,
        publish_every_steps=publish_every_steps,
        rule=rule or RuleSpec(),
    )
    run = RunTerms.of(manifest)
    replica = run.new_replica()
    replica.set_start(start)
    return RunManifest.decode(manifest.encode()), replica.weights()


@dataclass
class SimulatedPeer:
    """One peer: who it is, how fast it trains, and what runs of it."""

    author: ToyAuthor
    name: str
    step_s: float
    seed: int
    listens: bool
    log: PacketLog
    peer: SwarmPeer | None = None
    steps: int = 0
    task: asyncio.Task[None] | None = None
    killed: bool = False
    notices: list[Notice] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        return self.task is not None and not self.killed and not self.task.done()


class SimulatedSwarm:
    """Builds peers on one MemoryNetwork. All of it runs on a VirtualLoop (tscale_net.virtual_time.run_virtual)."""

    def __init__(
        self,
        manifest: RunManifest,
        start: torch.Tensor,
        clock: Clock,
        rng: Rng,
        *,
        latency_s: float = 0.04,
        bandwidth_bytes_s: float | None = None,
        new_log: Callable[[], PacketLog] = MemoryLog,
    ) -> None:
        self.run = RunTerms.of(manifest)
        self.start = start
        self.clock = clock
        self.rng = rng
        self.network = MemoryNetwork(random.Random(rng.random()), clock, latency_s=latency_s, bandwidth_bytes_s=bandwidth_bytes_s)
        self.peers: list[SimulatedPeer] = []
        self._new_log = new_log
        self._trace = blake3()

    def add(self, step_s: float = 1.0, listens: bool = True) -> SimulatedPeer:
        """A new identity; not running yet. It trains a step each `step_s` virtual seconds; 0: never. `listens`: others can dial it."""
        n = len(self.peers)
        identity = Identity.from_seed(blake3(f"peer {n}".encode()).digest())
        self.peers.append(SimulatedPeer(ToyAuthor(identity), f"peer-{n}", step_s, n, listens, self._new_log()))
        return self.peers[-1]

    async def found(self, sim: SimulatedPeer, role: str = "seed") -> str:
        """Start `sim` with the start weights; returns the address to join at."""
        replica = self.run.new_replica()
        replica.set_start(self.start)
        return await self._launch(sim, role, (), replica=replica, joined=True)

    async def join(self, sim: SimulatedPeer, *bootstrap: str) -> None:
        """Start `sim` as a newcomer that knows only addresses: manifest, snapshot, then packets."""
        await self._launch(sim, "peer", bootstrap, replica=self.run.new_replica(), joined=False)

    async def _launch(self, sim: SimulatedPeer, role: str, bootstrap: tuple[str, ...], *, replica: Replica, joined: bool) -> str:
        known_run = self.run.run if joined else b""
        transport = self.network.transport(sim.author.identity, sim.name, known_run, listens=sim.listens)
        rng = random.Random(self.rng.random())
        outside = Outside(transport, Transfers(transport, self.clock, rng), self.clock, rng, toy_verify)
        addresses = tuple(await transport.start())
        if not joined:
            await learn_run(outside, bootstrap)
        board = NoticeBoard(self.clock, lambda notice: self._note(sim, notice))
        weights = self.start.clone()
        peer = assemble(
            self.run, sim.author, outside, replica=replica, weights=weights, log=sim.log, stream=rng.getrandbits(63),
            settings=PeerSettings(sim.name, role, bootstrap, addresses), board=board, joined=joined,
        )  # fmt: skip
        sim.peer = peer
        outside.transfers.serve(provide_from(peer, self.run.manifest.encode(), len(self.run.terms.layout.chunks), lambda: None, _nothing))
        sim.task = asyncio.get_running_loop().create_task(self._live(sim, peer, joined))
        if not joined:
            while peer.gossip.hold:
                await self.clock.sleep(0.1)
                if sim.task.done():
                    sim.task.result()
        return addresses[0] if addresses else ""

    async def _live(self, sim: SimulatedPeer, peer: SwarmPeer, joined: bool) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(peer.run())
            reload_when_needed(peer, self.run.manifest, tasks)
            if not joined:
                await fetch_snapshot(peer, self.run.manifest)
            tasks.create_task(self._train(sim, peer))

    async def _train(self, sim: SimulatedPeer, peer: SwarmPeer) -> None:
        generator = torch.Generator().manual_seed(sim.seed)
        weights = peer.meeting.exchange.weights
        peer.training_active = True
        while sim.step_s > 0 and peer.training_active:
            await self.clock.sleep(sim.step_s)
            if not peer.training_active:
                return
            weights += DRIFT + NOISE * torch.randn(weights.numel(), generator=generator)
            sim.steps += 1
            peer.meeting.meet(Progress(sim.steps, sim.steps, sim.steps * STEP_TOKENS, 1.0, trained=True))

    def kill(self, sim: SimulatedPeer) -> None:
        """SIGKILL: everything in memory is gone, connections are reset."""
        assert sim.task is not None
        sim.killed = True
        sim.task.cancel()
        self.network.kill(sim.author.peer_id)

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


async def _nothing(name: str) -> None:
    return None
