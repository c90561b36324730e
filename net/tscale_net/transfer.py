"""Blobs over any Transport: manifests, snapshots, data shards.

Enters: a provider (to serve), names and sources (to fetch), and every Frame event: the transport's owner passes each to `handle` first.
Leaves: content whose every chunk was checked. Receiver-driven: see transfer_client.py for fetching, transfer_server.py for serving.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import BinaryIO

from tscale_net.assembly import Progress
from tscale_net.blobs import BlobSource, BytesSource
from tscale_net.errors import Refused
from tscale_net.messages import TRANSFER_KINDS, BlobFailed, BlobHashes, BlobOpened, Kind, decode
from tscale_net.ports import Channel, Clock, Frame, PeerId, Rng, Transport
from tscale_net.tasks import TaskOwner
from tscale_net.token_bucket import TokenBucket
from tscale_net.transfer_client import ChunkCame, Fetch, LinkLost, Mail, Mailbox
from tscale_net.transfer_server import CHUNK_PREFIX, Provider, TransferServer

__all__ = ["BlobSource", "BytesSource", "Provider", "Transfers"]

_ANSWERS = frozenset({Kind.BLOB_OPENED, Kind.BLOB_FAILED, Kind.BLOB_HASHES, Kind.BLOB_CHUNK})
_TRANSFER_NUMBER_BITS = 62


class Transfers:
    """Serves and fetches blobs over one transport."""

    def __init__(self, transport: Transport, clock: Clock, rng: Rng, download: TokenBucket | None = None) -> None:
        """download: limit of what is asked for, bytes per second, shared with whoever else asks."""
        self.refused: Counter[str] = Counter()
        """Malformed transfer messages by reason code; their senders' links are dropped."""
        self._transport = transport
        self._clock = clock
        self._rng = rng
        self._download = download
        self._failure: BaseException | None = None
        self._tasks = TaskOwner(self._fail)
        self._server = TransferServer(transport, clock, self._tasks)
        self._boxes: dict[tuple[PeerId, int], Mailbox] = {}

    def serve(self, provider: Provider) -> None:
        """Answer requests from now on by asking `provider(peer, name)`."""
        self._server.provider = provider

    @property
    def serving(self) -> int:
        """Number of blobs held open for other peers."""
        return self._server.open_transfers

    def handle(self, frame: Frame) -> bool:
        """True if the frame belonged to a transfer and was consumed. Re-raises an unexpected error of a serving task."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if frame.kind not in TRANSFER_KINDS:
            return False
        try:
            if frame.kind in _ANSWERS:
                self._deliver(frame)
            else:
                self._server.handle(frame)
        except Refused as refusal:
            self.refused[refusal.code] += 1
            self._transport.drop(frame.peer, refusal.detail)
        return True

    def peer_gone(self, peer: PeerId) -> None:
        """Optional: tell fetches at once that a link went down (they notice within a second without it)."""
        for (owner, _), box in self._boxes.items():
            if owner == peer:
                box.put(LinkLost())

    async def fetch(
        self,
        name: str,
        sources: Sequence[PeerId],
        *,
        max_bytes: int,
        expected_hash: bytes | None = None,
        sink: BinaryIO | None = None,
        progress: Progress | None = None,
    ) -> bytes:
        """Fetch a blob and return its content, or b"" if it was written to `sink` (seekable; overwritten from its start).

        With `expected_hash` (BLAKE3 of the content, 32 bytes) several sources are used at once; without it, the first that can deliver.
        `progress(bytes_done, bytes_total)` is called as content is written. A lost link is waited for and the transfer resumed.
        Raises Refused("no-source") naming what each source said, and OSError if the sink cannot be written. Cancellation closes the
        transfer at all sources.
        """
        fetch = Fetch(
            self._transport, self._clock, name,
            max_bytes=max_bytes, expected_hash=expected_hash, sink=sink, progress=progress, download=self._download,
        )  # fmt: skip
        boxes = [Mailbox(peer, self._rng.getrandbits(_TRANSFER_NUMBER_BITS)) for peer in dict.fromkeys(sources)]
        for box in boxes:
            self._boxes[box.peer, box.transfer] = box
        try:
            return await fetch.run(boxes)
        finally:
            for box in boxes:
                del self._boxes[box.peer, box.transfer]

    async def close(self) -> None:
        """Stop serving."""
        self._server.provider = None
        await self._tasks.close()

    def _deliver(self, frame: Frame) -> None:
        transfer, mail = _read_answer(frame)
        box = self._boxes.get((frame.peer, transfer))
        if box is not None:  # otherwise a late answer to a fetch that ended
            box.put(mail)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error


def _read_answer(frame: Frame) -> tuple[int, Mail]:
    if frame.kind == Kind.BLOB_CHUNK:
        if len(frame.body) < CHUNK_PREFIX.size or frame.channel is not Channel.BULK:
            raise Refused("bad-message", "A chunk is shorter than its prefix or came on the wrong channel.")
        transfer, index = CHUNK_PREFIX.unpack_from(frame.body)
        return transfer, ChunkCame(index, memoryview(frame.body)[CHUNK_PREFIX.size :])
    if frame.kind == Kind.BLOB_OPENED:
        opened = decode(BlobOpened, frame.body)
        return opened.transfer, opened
    if frame.kind == Kind.BLOB_FAILED:
        failed = decode(BlobFailed, frame.body)
        return failed.transfer, failed
    hashes = decode(BlobHashes, frame.body)
    return hashes.transfer, hashes
