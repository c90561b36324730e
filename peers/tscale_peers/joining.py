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
    """Before there is a SwarmPeer: feed transfers, and remember which run each peer states (the value). All else comes again by gossip."""
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
    for _ in range(limits.link_event_turns):  # LinkUp is queued already when dial returns, unless the link is gone again
        if peer in runs:
            break
        await outside.clock.sleep(0)
    else:
        raise Refused("no-answer", "the link was lost as soon as it stood; try again")
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
    await ChunkFetch(peer, manifest, progress).run(range(len(manifest.layout().chunks)))
    peer.gossip.resume()


class ChunkFetch:
    """Fetches chunks, several at a time and from several donors (default: all linked peers), and loads each as it comes."""

    def __init__(
        self,
        peer: SwarmPeer,
        manifest: RunManifest,
        progress: Progress = lambda here, total, received: None,
        *,
        only_if_ahead: bool = False,
        donors: Sequence[PeerId] = (),
    ) -> None:
        self.loaded: list[int] = []
        """Chunks that were replaced."""
        self.dropped: list[int] = []
        """Those of them whose private work could not be kept (Exchange.load_chunks)."""
        self._peer = peer
        self._manifest = manifest
        self._chunks = manifest.layout().chunks
        self._progress = progress
        self._only_if_ahead = only_if_ahead
        self._donors = donors
        self._unfit: set[PeerId] = set()
        """Donors that gave a chunk which could not be loaded: they are asked last."""
        self._received = 0
        self._here = 0

    async def run(self, chunks: Sequence[int]) -> None:
        """Raises Refused for a chunk that nobody could give; what came before it is loaded."""
        left = list(reversed(chunks))

        async def worker() -> None:
            while left:
                self._received += await self._fetch(left.pop())
                self._here += 1
                self._progress(self._here, len(chunks), self._received)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(limits.chunk_fetches, len(left))):
                    tasks.create_task(worker())
        except* Refused as group:
            raise group.exceptions[0] from None
        finally:
            self._peer.recount_known()

    async def _fetch(self, index: int) -> int:
        """One chunk, from one donor after the other until it could be loaded; returns its bytes. Each chunk begins with another donor, so
        that the load spreads. Links may come up meanwhile."""
        failure = "no peer is linked"
        for attempt in range(limits.chunk_retries):
            for donor in self._in_turn(index + attempt):
                try:
                    return await self._fetch_from(donor, index)
                except Refused as refusal:
                    failure = refusal.detail
            await self._peer.outside.clock.sleep(limits.chunk_retry_s * (attempt + 1))
        raise Refused(
            "no-snapshot", f"chunk {index} of the snapshot could not be fetched: {failure}; check the link or give another --bootstrap"
        )

    def _in_turn(self, turn: int) -> list[PeerId]:
        linked = sorted(self._peer.linked.intersection(self._donors) if self._donors else self._peer.linked)
        turn %= max(1, len(linked))
        return sorted(linked[turn:] + linked[:turn], key=self._unfit.__contains__)

    async def _fetch_from(self, donor: PeerId, index: int) -> int:
        most = chunk_blob_max_bytes(self._chunks[index].size, self._manifest)
        data = await self._peer.outside.transfers.fetch(f"{CHUNK_PREFIX}{index}", [donor], max_bytes=most)
        try:
            await self._peer.beside_training(lambda: self._load(index, data))
        except Refused as refusal:
            self._unfit.add(donor)
            self._peer.board.refuse(refusal, self._peer.name_of(donor))
            raise
        return len(data)

    def _load(self, index: int, data: bytes) -> None:
        if self._only_if_ahead and not _is_ahead(self._peer, index, data):
            return
        self.dropped += self._peer.meeting.load_chunks({index: data})
        self.loaded.append(index)


def chunk_blob_max_bytes(size: int, manifest: RunManifest) -> int:
    """Values as int32, and the applied entries that a chunk may carry at most."""
    return size * 4 + manifest.limits.max_streams * limits.chunk_entry_max_bytes + limits.chunk_header_max_bytes


def reload_when_needed(peer: SwarmPeer, manifest: RunManifest, tasks: asyncio.TaskGroup) -> None:
    """From now on, packets that nobody keeps any more, or that are more bytes than their chunks, are replaced by fetching these: this peer
    was away for long.

    A chunk rests after it was fetched, for twice as long each time that this brought nothing: some neighbour may speak of packets that it
    never had.
    """
    rests: dict[int, tuple[float, float]] = {}
    """chunk -> (when it may be fetched again, how long it rested last)."""

    async def reload(chunks: Sequence[int], donors: Sequence[PeerId], for_its_price: bool) -> None:
        fetch = ChunkFetch(peer, manifest, only_if_ahead=True, donors=donors)
        try:
            await fetch.run(chunks)
        except Refused as refusal:
            peer.board.refuse(refusal, "the swarm")
        finally:
            peer.gossip.give_up(chunks)
        for index in fetch.loaded:
            rests[index] = (rests[index][0], limits.chunk_reload_pause_s / 2)
        if fetch.loaded:
            kept = f"; private work in {len(fetch.dropped)} of them is given up" if fetch.dropped else ""
            why = "that is fewer bytes than the deltas missed" if for_its_price else "their deltas are no longer kept by anybody"
            text = f"{len(fetch.loaded)} chunks of the basepoint came as a snapshot: {why}{kept}"
            peer.board.tell("catch-up", text)

    def start(need: NeedChunks) -> None:
        now = peer.outside.clock.now()
        fresh = [chunk for chunk in need.chunks if rests.get(chunk, (now, 0.0))[0] <= now]
        for chunk in fresh:
            rest = min(limits.chunk_reload_pause_max_s, 2 * rests.get(chunk, (0.0, limits.chunk_reload_pause_s / 2))[1])
            rests[chunk] = (now + rest, rest)
        if fresh:
            tasks.create_task(reload(fresh, need.sources, need.for_its_price))
        peer.gossip.give_up(set(need.chunks).difference(fresh))

    peer.reload_chunks = start


def _is_ahead(peer: SwarmPeer, index: int, data: bytes) -> bool:
    """Does the donor's chunk contain more packets than ours? Of two halves that were apart for longer than the logs reach, the one with
    fewer packets takes over the other's chunks (both doing so would only swap them); what it alone had beyond its log is lost."""
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
