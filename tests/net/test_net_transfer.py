"""Blob transfer: cuts, failing and lying sources, limits, in virtual time."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from net_kit import identity

from tscale_net import limits
from tscale_net.assembly import Assembly
from tscale_net.blobs import BytesSource, OpenBlob, chunk_count, root_of
from tscale_net.errors import Refused
from tscale_net.memory_network import MemoryNetwork
from tscale_net.memory_transport import MemoryTransport
from tscale_net.messages import BlobOpen, BlobOpened, BlobWanted, Kind, encode
from tscale_net.ports import Channel, Frame, LinkDown, PeerId, Rng
from tscale_net.testing import VirtualClock, run_virtual
from tscale_net.transfer import BlobSource, Transfers

CHUNK = limits.CHUNK_BYTES
MAX_BYTES = 1 << 30


def content_of(size: int) -> bytes:
    return blake3(size.to_bytes(8, "little")).digest(length=size)


class World:
    """Peer 0 fetches; the others serve. Each has its own pump, as the shell of a real peer."""

    def __init__(self, clock: VirtualClock, rng: Rng, bandwidth_bytes_s: float | None = 4e6) -> None:
        self.clock = clock
        self.rng = rng
        self.network = MemoryNetwork(rng, clock, bandwidth_bytes_s=bandwidth_bytes_s)
        self.transports: list[MemoryTransport] = []
        self.transfers: list[Transfers] = []
        self.addresses: list[str] = []
        self.served: list[int] = []
        self.tamper: Callable[[Frame], Frame | None] = lambda frame: frame
        self._tasks: list[asyncio.Task[None]] = []

    async def add(self, blobs: dict[str, bytes]) -> PeerId:
        number = len(self.transports)
        transport = self.network.transport(identity(number + 1))
        transfers = Transfers(transport, self.clock, self.rng)

        async def provide(peer: PeerId, name: str) -> bytes | BlobSource | None:
            self.served[number] += 1
            return blobs.get(name)

        if blobs:
            transfers.serve(provide)
        self.transports.append(transport)
        self.transfers.append(transfers)
        self.served.append(0)
        self.addresses.append((await transport.start())[0])
        self._tasks.append(asyncio.get_running_loop().create_task(self._pump(number)))
        if number:
            await self.transports[0].dial(self.addresses[number])
        return transport.peer_id

    async def _pump(self, number: int) -> None:
        transport, transfers = self.transports[number], self.transfers[number]
        while True:
            try:
                event = await transport.next_event()
            except Refused:
                return
            if isinstance(event, Frame):
                passed = self.tamper(event) if number == 0 else event
                if passed is not None:
                    transfers.handle(passed)
            elif isinstance(event, LinkDown):
                transfers.peer_gone(event.peer)

    async def fetch(self, sources: list[PeerId], **more: Any) -> bytes:
        return await self.transfers[0].fetch("x", sources, **{"max_bytes": MAX_BYTES, **more})


Scene = Callable[[World], Coroutine[Any, Any, None]]


def in_virtual_time(test: Scene) -> Callable[[], None]:
    def run() -> None:
        async def scene(clock: VirtualClock, rng: Rng) -> None:
            await test(World(clock, rng))

        run_virtual(scene)

    run.__name__ = test.__name__
    return run


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("to_file", [False, True])
def test_every_size_arrives(size: int, to_file: bool) -> None:
    async def scene(clock: VirtualClock, rng: Rng) -> None:
        world = World(clock, rng)
        await world.add({})
        source = await world.add({"x": content_of(size)})
        sink = io.BytesIO(b"old content that is longer" * 3) if to_file else None
        seen: list[tuple[int, int]] = []
        got = await world.fetch([source], sink=sink, progress=lambda done, total: seen.append((done, total)), max_bytes=size)
        assert (sink.getvalue() if sink else got) == content_of(size)
        assert seen == [(min(size, (i + 1) * CHUNK), size) for i in range(chunk_count(size))]

    run_virtual(scene)


@in_virtual_time
async def test_several_sources_share_the_work(world: World) -> None:
    await world.add({})
    content = content_of(20 * limits.MIB)
    sources = [await world.add({"x": content}) for _ in range(3)]
    before_s = world.clock.now()
    assert await world.fetch(sources, expected_hash=blake3(content).digest()) == content
    took_s = world.clock.now() - before_s
    assert took_s < 0.5 * len(content) / 4e6, "three uplinks are faster than one"
    for transport in world.transports[1:]:
        assert world.transports[0].links()[0].down_bytes > 0
        assert transport.links()[0].up_bytes > 4 * limits.MIB


@in_virtual_time
async def test_cuts_are_survived_with_few_bytes_sent_again(world: World) -> None:
    await world.add({})
    content = content_of(60 * limits.MIB)
    source = await world.add({"x": content})

    async def cut_again_and_again() -> None:
        while True:
            await world.clock.sleep(5)
            world.network.cut(world.transports[0].peer_id, source)
            await world.clock.sleep(0.5)
            await world.transports[0].dial(world.addresses[1])

    cutter = asyncio.get_running_loop().create_task(cut_again_and_again())
    received = 0

    def count(frame: Frame) -> Frame:
        nonlocal received
        received += len(frame.body) if frame.kind == Kind.BLOB_CHUNK else 0
        return frame

    world.tamper = count
    assert await world.fetch([source]) == content
    assert world.served[1] == 1, "the provider is asked once, whatever happens to the link"
    assert received < 1.05 * len(content)
    cutter.cancel()


@in_virtual_time
async def test_source_that_dies_is_replaced(world: World) -> None:
    await world.add({})
    content = content_of(8 * limits.MIB)
    sources = [await world.add({"x": content}) for _ in range(2)]

    async def kill_later() -> None:
        await world.clock.sleep(0.8)
        world.network.kill(sources[0])

    killer = asyncio.get_running_loop().create_task(kill_later())
    assert await world.fetch(sources, expected_hash=blake3(content).digest()) == content
    await killer


@in_virtual_time
async def test_changing_content_starts_anew_at_the_next_source(world: World) -> None:
    await world.add({})
    sources = [await world.add({"x": content_of(6 * limits.MIB)}), await world.add({"x": content_of(5 * limits.MIB)})]

    async def kill_later() -> None:
        await world.clock.sleep(0.8)
        world.network.kill(sources[0])

    killer = asyncio.get_running_loop().create_task(kill_later())
    sink = io.BytesIO()
    await world.fetch(sources, sink=sink)
    assert sink.getvalue() == content_of(5 * limits.MIB)
    await killer


@in_virtual_time
async def test_liar_about_the_content_is_left_for_an_honest_source(world: World) -> None:
    await world.add({})
    honest = content_of(3 * limits.MIB)
    sources = [await world.add({"x": content_of(3 * limits.MIB + 1)}), await world.add({"x": honest})]
    for order in (sources, sources[::-1]):
        assert await world.fetch(order, expected_hash=blake3(honest).digest()) == honest
    with pytest.raises(Refused, match="wrong-hash"):
        await world.fetch(sources[:1], expected_hash=blake3(honest).digest())


@in_virtual_time
async def test_nobody_can_deliver_and_each_says_why(world: World) -> None:
    me = await world.add({})
    silent = await world.add({})
    other = await world.add({"y": b"something else"})
    for sources in ([silent, other], [silent, other, me]):
        with pytest.raises(Refused) as caught:
            await world.fetch(sources)
        assert caught.value.code == "no-source"
        assert str(caught.value).count("not-here") == 2
        assert all(source[-6:] in str(caught.value) for source in sources)
    with pytest.raises(Refused, match="nobody"):
        await world.fetch([])


def corrupt(frame: Frame, offset: int = -1) -> Frame:
    body = bytearray(frame.body)
    body[offset] ^= 1
    return Frame(frame.peer, frame.kind, bytes(body), frame.channel)


LIES: dict[str, tuple[Kind, Callable[[Frame], Frame | None], str]] = {
    "corrupt chunk": (Kind.BLOB_CHUNK, corrupt, "corrupt-chunk"),
    "short chunk": (Kind.BLOB_CHUNK, lambda frame: Frame(frame.peer, frame.kind, frame.body[:-1], frame.channel), "corrupt-chunk"),
    "long chunk": (Kind.BLOB_CHUNK, lambda frame: Frame(frame.peer, frame.kind, frame.body + b"x", frame.channel), "corrupt-chunk"),
    "unasked chunk": (Kind.BLOB_CHUNK, lambda frame: corrupt(frame, 9), "did not answer"),  # a few may be late ones of an earlier try
    "corrupt hashes": (Kind.BLOB_HASHES, corrupt, "corrupt-chunk"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_on_the_way_are_found_and_another_source_helps(lie: str) -> None:
    kind, change, code = LIES[lie]

    async def scene(clock: VirtualClock, rng: Rng) -> None:
        world = World(clock, rng)
        await world.add({})
        content = content_of(2 * limits.MIB + 77)
        liar, honest = await world.add({"x": content}), await world.add({"x": content})
        world.tamper = lambda frame: change(frame) if frame.peer == liar and frame.kind == kind else frame
        assert await world.fetch([liar, honest], expected_hash=blake3(content).digest()) == content
        with pytest.raises(Refused, match=code):
            await world.fetch([liar])

    run_virtual(scene)


@in_virtual_time
async def test_size_over_the_callers_limit_costs_nothing(world: World) -> None:
    await world.add({})
    source = await world.add({"x": content_of(CHUNK)})
    with pytest.raises(Refused, match="too-large"):
        await world.fetch([source], max_bytes=CHUNK - 1)

    def claim(frame: Frame) -> Frame:
        if frame.kind != Kind.BLOB_OPENED:
            return frame
        transfer = next(iter(world.transfers[0]._boxes))[1]
        return Frame(frame.peer, frame.kind, encode(BlobOpened(transfer, limits.BLOB_BYTES, bytes(32))), frame.channel)

    world.tamper = claim
    with pytest.raises(Refused, match="too-large"):
        await world.fetch([source])


@in_virtual_time
async def test_stalled_source_is_given_up(world: World) -> None:
    await world.add({})
    source = await world.add({"x": content_of(4 * CHUNK)})
    world.tamper = lambda frame: None if frame.kind == Kind.BLOB_CHUNK else frame
    with pytest.raises(Refused, match="did not answer"):
        await world.fetch([source])


@in_virtual_time
async def test_cancelled_fetch_closes_at_the_source(world: World) -> None:
    await world.add({})
    source = await world.add({"x": content_of(40 * limits.MIB)})
    fetch = asyncio.get_running_loop().create_task(world.fetch([source]))
    await world.clock.sleep(1)
    assert world.transfers[1].serving == 1
    fetch.cancel()
    await asyncio.gather(fetch, return_exceptions=True)
    await world.clock.sleep(10)
    assert world.transfers[1].serving == 0
    assert not world.transfers[0]._boxes


@in_virtual_time
async def test_server_limits_what_one_peer_keeps_open(world: World) -> None:
    await world.add({})
    source = await world.add({"x": content_of(CHUNK)})
    for transfer in range(limits.SERVED_PER_PEER + 3):
        world.transports[0].send(source, Kind.BLOB_OPEN, encode(BlobOpen(transfer, "x")))
    await world.clock.sleep(5)
    assert world.transfers[1].serving == limits.SERVED_PER_PEER
    with pytest.raises(Refused, match="busy"):
        await world.fetch([source])
    await world.clock.sleep(limits.SERVED_IDLE_S + 1)
    assert await world.fetch([source]) == content_of(CHUNK), "idle transfers made room"


@in_virtual_time
async def test_malformed_transfer_messages_end_the_link(world: World) -> None:
    await world.add({})
    source = await world.add({"x": content_of(CHUNK)})
    me = world.transports[0]
    lies = [
        (Kind.BLOB_OPEN, b"garbage"),
        (Kind.BLOB_CHUNK, b"short"),
        (Kind.BLOB_WANTED, encode(BlobWanted(1, [5]))),
    ]
    for kind, body in lies:
        await me.dial(world.addresses[1])
        me.send(source, Kind.BLOB_OPEN, encode(BlobOpen(1, "x")))
        await world.clock.sleep(1)
        me.send(source, kind, body)
        await world.clock.sleep(1)
        assert not me.links()
    assert world.transfers[1].refused == {"bad-message": 3}


@in_virtual_time
async def test_failing_provider_says_why_and_a_bug_is_raised(world: World) -> None:
    await world.add({})
    source = await world.add({"x": b""})

    async def refuse(peer: PeerId, name: str) -> bytes:
        raise Refused("busy", "The snapshot is being made.")

    world.transfers[1].serve(refuse)
    with pytest.raises(Refused, match="being made"):
        await world.fetch([source])

    class Unreadable:
        size = CHUNK

        def read(self, offset: int, length: int) -> bytes:
            raise OSError(5, "Input/output error")

    async def unreadable(peer: PeerId, name: str) -> BlobSource:
        return Unreadable()

    world.transfers[1].serve(unreadable)
    with pytest.raises(Refused, match="blob-failed.*input/output"):
        await world.fetch([source])

    async def buggy(peer: PeerId, name: str) -> bytes:
        raise ZeroDivisionError("a bug")

    transfers = Transfers(world.transports[0], world.clock, world.rng)
    transfers.serve(buggy)
    opening = Frame(source, Kind.BLOB_OPEN, encode(BlobOpen(1, "x")), Channel.CONTROL)
    assert transfers.handle(opening)
    await world.clock.sleep(1)
    with pytest.raises(ZeroDivisionError):
        transfers.handle(opening)
    assert not transfers.handle(Frame(source, 40, b"", Channel.CONTROL)), "application frames are passed on"
    await transfers.close()


@in_virtual_time
async def test_full_disk_is_the_callers_error(world: World) -> None:
    await world.add({})
    source = await world.add({"x": content_of(CHUNK)})

    class FullDisk(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        await world.fetch([source], sink=FullDisk())


@settings(max_examples=30)
@given(st.integers(0, 5 * CHUNK), st.randoms(use_true_random=False), st.integers(1, 9))
def test_assembly_accepts_any_order(size: int, rng: Rng, batch: int) -> None:
    async def scene() -> None:
        content = content_of(size)
        blob = OpenBlob(BytesSource(content))
        await blob.hash_all()
        assembly = Assembly(blob.size, blob.root, None, None)
        assembly.set_hashes(blob.hashes)
        asked: list[int] = []
        while not assembly.complete:
            asked += assembly.take(batch, 0.0)
            index = asked.pop(rng.randrange(len(asked)))
            if rng.random() < 0.2:
                assembly.give_back([index])
            else:
                assembly.put(index, blob.read_chunk(index))
                assert not assembly.put(index, blob.read_chunk(index)), "twice is once"
        assert assembly.content() == content
        assert assembly.content_hash() == blake3(content).digest()

    run_virtual(scene())


def test_root_commits_to_size_and_hashes() -> None:
    assert len({root_of(1, b""), root_of(2, b""), root_of(1, bytes(32)), root_of(1, bytes(64))}) == 4
