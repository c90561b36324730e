"""The fetching half of blob transfer: one `Fetch` pulls one blob from one or several peers.

Enters: BLOB_OPENED, BLOB_FAILED, BLOB_HASHES, BLOB_CHUNK of the sources. Leaves: questions and credit; in the end the content.

Rules
- The receiver pulls: a source may send only chunks that it was asked for. The window of a source grows while its chunks come quickly and
  shrinks when they wait, so slow links get short queues and fast ones are filled.
- Everything is checked before it is believed: size against the caller's limit before any memory, hashes against the root, chunks against
  the hashes, the whole against the expected hash.
- A source that fails, lies or stalls is left with its reason noted; the others go on with what is missing. A lost link is waited for, and
  the transfer resumes where it was. Sources with other content are kept for a second round.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import BinaryIO, TypeVar

from tscale_net import limits
from tscale_net.assembly import Assembly, Progress
from tscale_net.blobs import HASH_BYTES
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
    encode,
)
from tscale_net.ports import Channel, Clock, PeerId, Transport
from tscale_net.token_bucket import TokenBucket


class LinkLost:
    """Put into a mailbox when the link to its peer went down."""


class ChunkCame:
    """One chunk as it arrived, unchecked."""

    def __init__(self, index: int, data: memoryview) -> None:
        self.index = index
        self.data = data


Mail = BlobOpened | BlobFailed | BlobHashes | ChunkCame | LinkLost


class Mailbox:
    """What one source answered about one transfer."""

    def __init__(self, peer: PeerId, transfer: int) -> None:
        self.peer = peer
        self.transfer = transfer
        self.mail: asyncio.Queue[Mail] = asyncio.Queue()

    def put(self, mail: Mail) -> None:
        """Deliver; what is far beyond the credit given is thrown away (the window check would refuse it anyway)."""
        if self.mail.qsize() <= 2 * limits.WINDOW_MAX_CHUNKS or isinstance(mail, LinkLost):
            self.mail.put_nowait(mail)


M = TypeVar("M", BlobOpened, BlobHashes, ChunkCame)


class _Lost(Exception):
    """The link to the source is gone, or it stalled; worth another try."""


class _OtherContent(Exception):
    """The source holds different content under this name."""


class Fetch:
    """One blob being fetched."""

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        name: str,
        *,
        max_bytes: int,
        expected_hash: bytes | None,
        sink: BinaryIO | None,
        progress: Progress | None,
        download: TokenBucket | None = None,
    ) -> None:
        self._transport = transport
        self._clock = clock
        self._name = name
        self._max_bytes = min(max_bytes, limits.BLOB_BYTES)
        self._expected_hash = expected_hash
        self._sink = sink
        self._progress = progress
        self._download = download
        self._assembly: Assembly | None = None
        self._hashes_lock = asyncio.Lock()
        self._said: dict[PeerId, str] = {}
        self._other: list[Mailbox] = []
        self._givers: list[Mailbox] = []

    async def run(self, boxes: Sequence[Mailbox]) -> bytes:
        """Pull until the blob is complete. Raises Refused("no-source", ...) naming what each source said; OSError of the sink."""
        candidates = list(boxes)
        while candidates:
            self._begin_round()
            await self._round(candidates)
            assembly = self._assembly
            if assembly is not None and assembly.complete:
                if self._expected_hash in (None, assembly.content_hash()):
                    return assembly.content()
                for box in self._givers:
                    self._said[box.peer] = "wrong-hash: its content does not have the expected hash."
            candidates = self._other
        answers = "; ".join(f"{peer[:4]}…{peer[-6:]}: {said}" for peer, said in self._said.items())
        raise Refused("no-source", f"No peer could deliver {self._name!r}. Asked {answers or 'nobody (no peer is connected).'}")

    def _begin_round(self) -> None:
        self._assembly = None
        self._other = []
        self._givers = []
        if self._sink is not None:
            self._sink.seek(0)
            self._sink.truncate()

    async def _round(self, candidates: list[Mailbox]) -> None:
        """Let sources work until the blob is complete or none is left. Content without a known hash comes from one source at a time."""
        waiting = list(candidates)
        at_once = limits.SOURCES_AT_ONCE if self._expected_hash is not None else 1
        workers: set[asyncio.Task[None]] = set()
        try:
            while not (self._assembly is not None and self._assembly.complete):
                while waiting and len(workers) < at_once:
                    box = waiting.pop(0)
                    workers.add(asyncio.create_task(self._work(box), name=f"fetch {self._name} from {box.peer[-6:]}"))
                if not workers:
                    return
                done, workers = await asyncio.wait(workers, return_when=asyncio.FIRST_COMPLETED)
                for worker in done:
                    worker.result()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, box: Mailbox) -> None:
        """Pull from one source; note why it ended. Never raises for the source's faults."""
        tries = 0
        try:
            while True:
                got: list[int] = []
                try:
                    await self._session(box, got)
                    return
                except _Lost as lost:
                    tries = 0 if got else tries + 1
                    if tries >= limits.RELINK_TRIES or not await self._relinked(box):
                        self._said[box.peer] = str(lost)
                        return
        except _OtherContent:
            self._said[box.peer] = "it holds other content than the first source."
            self._other.append(box)
        except Refused as refusal:
            self._said[box.peer] = f"{refusal.code}: {refusal.detail}"
        finally:
            self._tell(box, Kind.BLOB_CLOSE, BlobClose(box.transfer))

    async def _relinked(self, box: Mailbox) -> bool:
        """Wait for the link to come back."""
        deadline_s = self._clock.now() + limits.RELINK_WAIT_S
        while not self._linked(box.peer):
            if self._clock.now() >= deadline_s:
                return False
            await self._clock.sleep(limits.RELINK_POLL_S)
        while not box.mail.empty():
            box.mail.get_nowait()  # answers of the old session
        return True

    async def _session(self, box: Mailbox, got: list[int]) -> None:
        """Open at one source and pull until all is complete; `got` collects the chunks that came."""
        await self._ask(box, Kind.BLOB_OPEN, BlobOpen(box.transfer, self._name))
        opened = await self._answer(box, BlobOpened, limits.OPEN_TIMEOUT_S)
        if opened.size > self._max_bytes:
            raise Refused("too-large", f"it offers {opened.size} bytes; at most {self._max_bytes} are accepted.")
        if self._assembly is None:
            self._assembly = Assembly(opened.size, opened.root, self._sink, self._progress)
        assembly = self._assembly
        if (assembly.size, assembly.root) != (opened.size, opened.root):
            raise _OtherContent
        if box not in self._givers:
            self._givers.append(box)
        async with self._hashes_lock:
            if assembly.hashes is None:
                assembly.set_hashes(await self._fetch_hashes(box, assembly))
        await self._pull(box, assembly, got)

    async def _fetch_hashes(self, box: Mailbox, assembly: Assembly) -> bytes:
        hashes = bytearray()
        while len(hashes) < assembly.chunks * HASH_BYTES:
            first = len(hashes) // HASH_BYTES
            await self._ask(box, Kind.BLOB_HASHES_WANTED, BlobHashesWanted(box.transfer, first))
            page = await self._answer(box, BlobHashes, limits.CHUNK_TIMEOUT_S)
            if page.first != first or not page.hashes or len(page.hashes) % HASH_BYTES:
                raise Refused("bad-message", "it sent a malformed page of hashes.")
            hashes += page.hashes
        return bytes(hashes)

    async def _pull(self, box: Mailbox, assembly: Assembly, got: list[int]) -> None:
        window = limits.WINDOW_START_CHUNKS
        strays = 0
        asked: dict[int, float] = {}
        try:
            while not assembly.complete:
                room = window - len(asked)
                if not asked or room > window // 4:
                    # A stolen chunk may be one that this source already owes; it is not asked twice.
                    fresh = [index for index in assembly.take(room, self._clock.now()) if index not in asked]
                    if fresh:
                        await self._wait_for_allowance(min(len(fresh) * limits.CHUNK_BYTES, assembly.size))
                        await self._ask(box, Kind.BLOB_WANTED, BlobWanted(box.transfer, fresh))
                        asked.update(dict.fromkeys(fresh, self._clock.now()))
                if not asked:
                    await self._until_changed(box, assembly)
                    continue
                chunk = await self._answer(box, ChunkCame, limits.CHUNK_TIMEOUT_S)
                if chunk.index not in asked:
                    # After a timeout on a slow link the transfer is opened anew while old chunks are still on their way.
                    strays += 1
                    if strays > limits.STRAY_CHUNKS:
                        raise Refused("bad-message", f"it sent chunk {chunk.index} without being asked.")
                    continue
                took_s = self._clock.now() - asked.pop(chunk.index)
                assembly.put(chunk.index, chunk.data)
                got.append(chunk.index)
                slow = took_s > limits.WINDOW_SLOW_S
                window = max(limits.WINDOW_MIN_CHUNKS, window - 1) if slow else min(limits.WINDOW_MAX_CHUNKS, window + 1)
        finally:
            assembly.give_back(list(asked))

    async def _wait_for_allowance(self, nbytes: int) -> None:
        wait_s = self._download.reserve(nbytes) if self._download is not None else 0.0
        if wait_s > 0:
            await self._clock.sleep(wait_s)

    async def _until_changed(self, box: Mailbox, assembly: Assembly) -> None:
        """Other sources hold all that is left: wait for news, at most until something may be asked twice."""
        assembly.changed.clear()
        try:
            async with asyncio.timeout(limits.STEAL_AFTER_S / 2):
                await assembly.changed.wait()
        except TimeoutError:
            if not self._linked(box.peer):
                raise _Lost("its link went down.") from None

    # --- talking to one source ------------------------------------------------------------------------------------------------
    async def _ask(self, box: Mailbox, kind: Kind, message: Message) -> None:
        while not self._tell(box, kind, message):
            if not self._linked(box.peer):
                raise _Lost("it is not connected.")
            await self._clock.sleep(limits.SERVE_RETRY_S)  # the queue is full

    def _tell(self, box: Mailbox, kind: Kind, message: Message) -> bool:
        return self._transport.send(box.peer, kind, encode(message), Channel.CONTROL)

    async def _answer(self, box: Mailbox, wanted: type[M], timeout_s: float) -> M:
        """The next answer of the wanted type; others are old and skipped. Raises _Lost, or Refused if the source gave up."""
        deadline_s = self._clock.now() + timeout_s
        while True:
            try:
                async with asyncio.timeout(limits.LINK_CHECK_S):
                    mail = box.mail.get_nowait() if not box.mail.empty() else await box.mail.get()
            except TimeoutError:
                if not self._linked(box.peer):
                    raise _Lost("its link went down.") from None
                if self._clock.now() >= deadline_s:
                    raise _Lost(f"it did not answer within {timeout_s:.0f} s.") from None
                continue
            if isinstance(mail, wanted):
                return mail
            if isinstance(mail, LinkLost):
                raise _Lost("its link went down.")
            if isinstance(mail, BlobFailed):
                raise Refused(mail.code, mail.detail)

    def _linked(self, peer: PeerId) -> bool:
        return any(link.peer == peer for link in self._transport.links())
