"""Joining: learn the run from any peer, fetch the basepoint from several, then live on ordinary packets.

Enters: addresses. Leaves: a checked manifest; a replica filled chunk by chunk, each from another donor, each with its own applied entries.
A donor may die at any chunk: the next one continues. What the chunks lack comes as packets by anti-entropy. The result is verified when
another peer's (digest, hash) pair equals ours; until then the peer says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from tscale_net.errors import Refused
from tscale_net.ports import Frame, LinkUp, PeerId
from tscale_peers import limits, snapshot_chunk
from tscale_peers.applied import ChunkEntry
from tscale_peers.donor import CHUNK_PREFIX, MANIFEST
from tscale_peers.gossip import NeedChunks
from tscale_peers.manifest import MAX_MANIFEST_BYTES, RunManifest
from tscale_peers.peer import Outside, SwarmPeer


@dataclass(frozen=True, slots=True)
class Learned:
    """A run as told by the first peer reached."""

    manifest: RunManifest
    peer: PeerId
    address: str


@asynccontextmanager
async def pumping(outside: Outside) -> AsyncIterator[dict[PeerId, bytes]]:
    """Before there is a SwarmPeer: feed transfers, and remember which run each peer states (the value). Anything else comes again by gossip."""
    runs: dict[PeerId, bytes] = {}
    pump = asyncio.create_task(_pump(outside, runs))
    try:
        yield runs
    finally:
        pump.cancel()
        await asyncio.gather(pump, return_exceptions=True)


async def learn_run(outside: Outside, addresses: Sequence[str]) -> Learned:
    """Dial the addresses in turn until one gives a manifest that hashes to the run it states.

    Raises Refused("unreachable") that names every address tried and why it failed. The link stays up.
    """
    failures: list[str] = []
    async with pumping(outside) as runs:
        for address in addresses:
            try:
                return await _ask(outside, address, runs)
            except Refused as refusal:
                failures.append(f"{address}: {refusal.detail}")
    raise Refused("unreachable", "no given address could be joined. " + " ".join(failures))


async def _pump(outside: Outside, runs: dict[PeerId, bytes]) -> None:
    while True:
        event = await outside.transport.next_event()
        if isinstance(event, LinkUp):
            runs[event.peer] = event.run
        elif isinstance(event, Frame):
            with suppress(Refused):
                outside.transfers.handle(event)


async def _ask(outside: Outside, address: str, runs: dict[PeerId, bytes]) -> Learned:
    peer = await outside.transport.dial(address)
    while peer not in runs:  # LinkUp is already queued when dial returns
        await outside.clock.sleep(0)
    run = runs[peer]
    if not run:
        raise Refused("no-run", "it has not joined a run itself yet; try again shortly or give another address")
    data = await outside.transfers.fetch(MANIFEST, [peer], max_bytes=MAX_MANIFEST_BYTES, expected_hash=run)
    manifest = RunManifest.decode(data, run)
    outside.transport.run = run
    return Learned(manifest, peer, address)


Progress = Callable[[int, int, int], None]
"""(chunks here, chunks in all, bytes received so far)."""


async def fetch_snapshot(peer: SwarmPeer, manifest: RunManifest, progress: Progress = lambda here, total, received: None) -> None:
    """Fill the whole replica from the linked peers. Raises Refused if no linked peer can give a chunk."""
    chunks = range(len(manifest.layout().chunks))
    await fetch_chunks(peer, manifest, list(chunks), progress)
    peer.gossip.hold = False


async def fetch_chunks(
    peer: SwarmPeer,
    manifest: RunManifest,
    chunks: Sequence[int],
    progress: Progress = lambda here, total, received: None,
    only_if_ahead: bool = False,
    donors: Sequence[PeerId] = (),
) -> int:
    """Fetch these chunks, several at a time and from several donors (default: all linked peers), and load each as it comes; returns how many
    were loaded."""
    layout = manifest.layout()
    left = list(reversed(chunks))
    received = here = loaded = 0

    async def worker() -> None:
        nonlocal received, here, loaded
        while left:
            index = left.pop()
            data = await _fetch_one(peer, index, donors, chunk_blob_max_bytes(layout.chunks[index].size, manifest))
            if not only_if_ahead or _is_ahead(peer, index, data):
                await peer.off_loop(lambda: peer.meeting.load_chunks({index: data}))
                loaded += 1
            received += len(data)
            here += 1
            progress(here, len(chunks), received)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(limits.chunk_fetches, len(left))):
                tasks.create_task(worker())
    except* Refused as group:
        raise group.exceptions[0] from None
    peer.recount_known()
    return loaded


def chunk_blob_max_bytes(size: int, manifest: RunManifest) -> int:
    """Values as int32, and the applied entries that a chunk may carry at most."""
    return size * 4 + manifest.limits.max_streams * limits.chunk_entry_max_bytes + limits.chunk_header_max_bytes


async def _fetch_one(peer: SwarmPeer, index: int, chosen: Sequence[PeerId], max_bytes: int) -> bytes:
    """One chunk from the donors in a rotated order, so that the load spreads; links may come up meanwhile."""
    for attempt in range(limits.chunk_retries):
        donors = sorted(peer.linked.intersection(chosen) if chosen else peer.linked)
        if donors:
            turn = (index + attempt) % len(donors)
            try:
                return await peer.outside.transfers.fetch(f"{CHUNK_PREFIX}{index}", donors[turn:] + donors[:turn], max_bytes=max_bytes)
            except Refused as refusal:
                failure = refusal.detail
        else:
            failure = "no peer is linked"
        await peer.outside.clock.sleep(limits.chunk_retry_s * (attempt + 1))
    raise Refused("no-snapshot", f"chunk {index} of the snapshot could not be fetched: {failure}; check the link or give another --bootstrap")


def reload_when_needed(peer: SwarmPeer, manifest: RunManifest, tasks: asyncio.TaskGroup) -> None:
    """From now on, packets that nobody keeps any more are replaced by fetching their chunks (a peer that was away for long)."""
    resting: dict[int, float] = {}

    async def reload(chunks: Sequence[int], donors: Sequence[PeerId]) -> None:
        try:
            loaded = await fetch_chunks(peer, manifest, chunks, only_if_ahead=True, donors=donors)
            if loaded:
                peer.board.tell("catch-up", f"{loaded} chunks of the basepoint came as a snapshot: their deltas are no longer kept by anybody")
        except Refused as refusal:
            peer.board.refuse(refusal, "the swarm")

    def start(need: NeedChunks) -> None:
        now = peer.outside.clock.now()
        fresh = [c for c in need.chunks if resting.get(c, 0.0) <= now]
        resting.update({c: now + limits.chunk_reload_pause_s for c in fresh})
        if fresh:
            tasks.create_task(reload(fresh, need.sources))

    peer.reload_chunks = start


def _is_ahead(peer: SwarmPeer, index: int, data: bytes) -> bool:
    """Does the donor's chunk contain more packets than ours? Of two halves that were apart for longer than the logs reach, the one with fewer
    packets takes over the other's chunks (both doing so would only swap them); what it alone had beyond its log is lost."""
    replica = peer.meeting.replica
    size = replica.layout.chunks[index].size
    _, theirs = snapshot_chunk.decode(data, index, size, replica.basepoint.dtype, replica.applied.max_streams)
    with replica.lock:
        ours = replica.applied.chunk_entries(index)
    return _weight(theirs) > _weight(ours)


def _weight(entries: Iterable[ChunkEntry]) -> tuple[int, list[tuple[bytes, list[tuple[int, int]]]]]:
    """How many packets; the sets themselves decide between equal numbers, so that the two sides never both give way."""
    listed = sorted((entry.stream_key, [(first, last) for first, last in entry.seqs]) for entry in entries)
    return sum(last - first + 1 for _, seqs in listed for first, last in seqs), listed
