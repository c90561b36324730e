"""The serving half of blob transfer: opens what is asked for, sends chunks for which it has credit.

Enters: BLOB_OPEN, BLOB_HASHES_WANTED, BLOB_WANTED, BLOB_CLOSE of any peer. Leaves: BLOB_OPENED or BLOB_FAILED, pages of hashes, chunks.
Rules: the provider is asked once per transfer and its answer kept until it is closed or idle; opening again with the same number goes on
with the same content, so a transfer survives a lost link. Chunks are read only while the link's bulk queue is short. Per peer and
in total only so many blobs are open.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Awaitable, Callable

from tscale_net import limits
from tscale_net.blobs import HASH_BYTES, BlobSource, BytesSource, OpenBlob, chunk_count
from tscale_net.errors import Refused
from tscale_net.messages import (
    BlobClose,
    BlobFailed,
    BlobHashes,
    BlobHashesWanted,
    BlobOpen,
    BlobOpened,
    BlobWanted,
    Kind,
    Message,
    decode,
    encode,
)
from tscale_net.ports import Channel, Clock, Frame, PeerId, Transport
from tscale_net.tasks import TaskOwner

Provider = Callable[[PeerId, str], Awaitable[bytes | BlobSource | None]]
"""Who asks, and for which name; None means "not here". It may take its time, and may raise Refused to say why not."""

CHUNK_PREFIX = struct.Struct("<QQ")
"""Transfer number and chunk index before the raw bytes of a chunk."""


class _Served:
    """One open transfer."""

    def __init__(self, name: str, now_s: float) -> None:
        self.name = name
        self.blob: OpenBlob | None = None
        self.wanted: deque[int] = deque()
        self.sending = False
        self.used_s = now_s


class TransferServer:
    """Serves blobs of one provider to all peers."""

    def __init__(self, transport: Transport, clock: Clock, tasks: TaskOwner) -> None:
        self.provider: Provider | None = None
        self._transport = transport
        self._clock = clock
        self._tasks = tasks
        self._served: dict[tuple[PeerId, int], _Served] = {}

    @property
    def open_transfers(self) -> int:
        """How many blobs are held open now."""
        return len(self._served)

    def handle(self, frame: Frame) -> None:
        """Act on one frame of an asker. Raises Refused("bad-message") for malformed ones."""
        if frame.kind == Kind.BLOB_OPEN:
            self._open(frame.peer, decode(BlobOpen, frame.body))
        elif frame.kind == Kind.BLOB_HASHES_WANTED:
            self._send_hashes(frame.peer, decode(BlobHashesWanted, frame.body))
        elif frame.kind == Kind.BLOB_WANTED:
            self._want(frame.peer, decode(BlobWanted, frame.body))
        else:
            self._served.pop((frame.peer, decode(BlobClose, frame.body).transfer), None)

    def _open(self, peer: PeerId, request: BlobOpen) -> None:
        self._drop_idle()
        key = (peer, request.transfer)
        served = self._served.get(key)
        if served is not None and served.name == request.name:
            served.used_s = self._clock.now()
            served.wanted.clear()  # a new connection: what was asked on the old one is asked again
            if served.blob is not None and served.blob.root:
                self._send_opened(peer, request.transfer, served.blob)
            return
        of_peer = sum(1 for other, _ in self._served if other == peer)
        if self.provider is None:
            self._fail(peer, request.transfer, Refused("not-here", "This peer serves nothing."))
        elif served is not None or of_peer >= limits.SERVED_PER_PEER or len(self._served) >= limits.SERVED_TOTAL:
            self._fail(peer, request.transfer, Refused("busy"))
        else:
            self._served[key] = served = _Served(request.name, self._clock.now())
            self._tasks.spawn(self._prepare(self.provider, key, served), f"open blob {request.name} for {peer[-6:]}")

    async def _prepare(self, provider: Provider, key: tuple[PeerId, int], served: _Served) -> None:
        peer, transfer = key
        try:
            content = await provider(peer, served.name)
            if content is None:
                raise Refused("not-here", f"This peer does not have {served.name!r}.")
            blob = OpenBlob(BytesSource(content) if isinstance(content, bytes) else content)
            served.blob = blob
            await blob.hash_all()
        except Refused as refusal:
            self._fail(peer, transfer, refusal)
            return
        served.used_s = self._clock.now()
        if self._served.get(key) is served:
            self._send_opened(peer, transfer, blob)

    def _send_opened(self, peer: PeerId, transfer: int, blob: OpenBlob) -> None:
        self._send(peer, Kind.BLOB_OPENED, BlobOpened(transfer, blob.size, blob.root))

    def _fail(self, peer: PeerId, transfer: int, refusal: Refused) -> None:
        self._served.pop((peer, transfer), None)
        self._send(peer, Kind.BLOB_FAILED, BlobFailed(transfer, refusal.code[:40], refusal.detail[: limits.REASON_CHARACTERS]))

    def _send(self, peer: PeerId, kind: Kind, message: Message, channel: Channel = Channel.CONTROL) -> bool:
        # A full queue or lost link is repaired by the asker, whose timers repeat the question.
        return self._transport.send(peer, kind, encode(message), channel)

    def _send_hashes(self, peer: PeerId, request: BlobHashesWanted) -> None:
        served = self._ready(peer, request.transfer)
        if served is None or served.blob is None:
            return
        page = served.blob.hashes[request.first * HASH_BYTES : (request.first + limits.HASHES_PER_PAGE) * HASH_BYTES]
        self._send(peer, Kind.BLOB_HASHES, BlobHashes(request.transfer, request.first, page), Channel.BULK)

    def _want(self, peer: PeerId, request: BlobWanted) -> None:
        served = self._ready(peer, request.transfer)
        if served is None or served.blob is None:
            return
        chunks = chunk_count(served.blob.size)
        if len(served.wanted) + len(request.chunks) > limits.WINDOW_MAX_CHUNKS or any(index >= chunks for index in request.chunks):
            raise Refused("bad-message", f"{peer} asks for chunks beyond its credit or beyond the end of the blob.")
        served.wanted.extend(request.chunks)
        if not served.sending:
            served.sending = True
            self._tasks.spawn(self._send_chunks(peer, request.transfer, served), f"send blob {served.name} to {peer[-6:]}")

    def _ready(self, peer: PeerId, transfer: int) -> _Served | None:
        served = self._served.get((peer, transfer))
        if served is None or served.blob is None or not served.blob.root:
            self._send(peer, Kind.BLOB_FAILED, BlobFailed(transfer, "not-here", "The transfer is not open here; open it again."))
            return None
        served.used_s = self._clock.now()
        return served

    async def _send_chunks(self, peer: PeerId, transfer: int, served: _Served) -> None:
        """Send what is wanted as fast as the link takes it. Ends when nothing is wanted or the transfer is gone."""
        assert served.blob is not None
        try:
            while served.wanted and self._served.get((peer, transfer)) is served:
                if self._transport.pending_bytes(peer) >= limits.SERVE_PENDING_BYTES:
                    await self._clock.sleep(limits.SERVE_RETRY_S)
                    continue
                index = served.wanted.popleft()
                body = CHUNK_PREFIX.pack(transfer, index) + served.blob.read_chunk(index)
                if not self._transport.send(peer, Kind.BLOB_CHUNK, body, Channel.BULK):
                    return  # link lost; the receiver opens again if it comes back
                served.used_s = self._clock.now()
                await self._clock.sleep(0)
        except Refused as refusal:
            self._fail(peer, transfer, refusal)
        finally:
            served.sending = False

    def _drop_idle(self) -> None:
        now_s = self._clock.now()
        for key, served in list(self._served.items()):
            ready = served.blob is not None and served.blob.root
            if ready and not served.sending and now_s - served.used_s > limits.SERVED_IDLE_S:
                del self._served[key]
