"""One link on wires of wood, in virtual time: queues, upload limit, keep-alive, floods, farewells."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from net_kit import identity

from tscale_net import frames, limits
from tscale_net.errors import Refused
from tscale_net.link import Link
from tscale_net.messages import HelloBody, Kind, Ping, bye_of, encode
from tscale_net.ports import Channel, Rng
from tscale_net.tasks import TaskOwner
from tscale_net.testing import VirtualClock, run_virtual
from tscale_net.token_bucket import TokenBucket
from tscale_net.wire import Wire, WireGone

KIND = 40
PEER = identity(2)
SESSION = bytes(range(16))


class WoodenWire(Wire):
    """Takes everything, at once or never."""

    def __init__(self, channel: Channel, clock: VirtualClock) -> None:
        super().__init__(channel)
        self.taken: list[tuple[float, int, bytes]] = []
        self.stuck = False
        self.gone = False
        self.closed = False
        self._clock = clock

    async def send(self, kind: int, body: bytes) -> None:
        if self.gone:
            raise WireGone
        if self.stuck:
            await asyncio.get_running_loop().create_future()
        self.taken.append((self._clock.now(), kind, body))

    def close(self) -> None:
        self.closed = True


class Owner:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.frames: list[tuple[int, bytes, Channel]] = []
        self.refused: list[str] = []
        self.ended: list[str] = []

    def frame_came(self, link: Link, kind: int, body: bytes, channel: Channel) -> None:
        self.frames.append((kind, body, channel))

    def frame_refused(self, link: Link, refusal: Refused) -> None:
        self.refused.append(refusal.code)

    def link_ended(self, link: Link, reason: str) -> None:
        self.ended.append(reason)


class Scene:
    def __init__(self, clock: VirtualClock, upload_bytes_s: float | None = None) -> None:
        self.clock = clock
        self.owner = Owner()
        self.wires = {channel: WoodenWire(channel, clock) for channel in Channel}
        self.failures: list[BaseException] = []
        self.tasks = TaskOwner(self.failures.append)
        hello = HelloBody(1, 1, PEER.public_key, identity(1).public_key, bytes(16), 0, b"", bytes(16), 1, SESSION, b"", "two", [])
        upload = TokenBucket(upload_bytes_s, clock) if upload_bytes_s else None
        wires: dict[Channel, Wire] = dict(self.wires)
        self.link = Link(PEER.peer_id, hello, wires, address="there", outgoing=True, owner=self.owner, clock=clock, upload=upload)
        self.link.start(self.tasks)
        self._sequence = {channel: 0 for channel in Channel}

    def hear(
        self, kind: int, body: bytes, channel: Channel = Channel.CONTROL, sequence: int | None = None, session: bytes = SESSION
    ) -> None:
        number = self._sequence[channel] if sequence is None else sequence
        self._sequence[channel] += 1
        self.link.receive([frames.encode_header(kind, number, session, len(body)), body], channel)

    async def ticks(self, seconds: float, reading: bool = True) -> None:
        until_s = self.clock.now() + seconds
        while self.clock.now() < until_s:
            await self.clock.sleep(limits.KEEP_ALIVE_TICK_S)
            self.link.tick(reading)


def in_virtual_time(test: Callable[[VirtualClock], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        async def scene(clock: VirtualClock, rng: Rng) -> None:
            await test(clock)

        run_virtual(scene)

    run.__name__ = test.__name__
    return run


@in_virtual_time
async def test_queues_are_bounded(clock: VirtualClock) -> None:
    scene = Scene(clock)
    for wire in scene.wires.values():
        wire.stuck = True
    control = 0
    while scene.link.send(KIND, b"x", Channel.CONTROL):
        control += 1
    assert control == limits.CONTROL_QUEUE_MESSAGES
    while scene.link.send(KIND, bytes(200_000), Channel.BULK):
        pass
    assert limits.BULK_QUEUE_BYTES - 200_000 < scene.link.pending_bytes() <= limits.BULK_QUEUE_BYTES
    await clock.sleep(1)
    assert scene.link.pending_bytes() > limits.BULK_QUEUE_BYTES - 200_000, "what a stuck socket holds still counts"


@in_virtual_time
async def test_upload_limit_holds_bulk_and_not_control(clock: VirtualClock) -> None:
    scene = Scene(clock, upload_bytes_s=100_000)
    for _ in range(20):
        assert scene.link.send(KIND, bytes(50_000), Channel.BULK)
    scene.link.send(KIND, b"urgent", Channel.CONTROL)
    await clock.sleep(0.001)
    assert [body for _, _, body in scene.wires[Channel.CONTROL].taken] == [b"urgent"]
    await clock.sleep(30)
    times = [time_s for time_s, _, _ in scene.wires[Channel.BULK].taken]
    assert len(times) == 20
    assert times[-1] == pytest.approx(10 - limits.UPLOAD_BURST_S, rel=0.01)
    assert all(later - earlier <= 0.6 for earlier, later in zip(times, times[1:], strict=False)), "spread, not in bursts"


@in_virtual_time
async def test_pings_measure_and_silence_ends(clock: VirtualClock) -> None:
    scene = Scene(clock)
    for _ in range(20):
        await scene.ticks(limits.KEEP_ALIVE_TICK_S)
        await clock.sleep(0.05)
        for _, kind, body in scene.wires[Channel.CONTROL].taken:
            if kind == Kind.PING:
                scene.hear(Kind.PONG, body)
        scene.wires[Channel.CONTROL].taken.clear()
    assert scene.link.rtt_s == pytest.approx(0.05, abs=0.01)
    assert not scene.owner.ended
    before_s = clock.now()
    while not scene.owner.ended:
        await scene.ticks(limits.KEEP_ALIVE_TICK_S)
    since_last_pong_s = limits.PING_INTERVAL_S + limits.KEEP_ALIVE_TICK_S
    assert limits.SILENCE_S - since_last_pong_s < clock.now() - before_s <= limits.SILENCE_S + 3 * limits.KEEP_ALIVE_TICK_S
    assert all(wire.closed for wire in scene.wires.values())
    assert not scene.link.send(KIND, b"", Channel.CONTROL)


@in_virtual_time
async def test_own_stall_is_not_the_peers_silence(clock: VirtualClock) -> None:
    scene = Scene(clock)
    await clock.sleep(300)  # this process stood still: no tick came
    scene.link.tick(reading=True)
    assert not scene.owner.ended
    await scene.ticks(300, reading=False)
    assert not scene.owner.ended, "what is not read cannot be heard"
    await scene.ticks(limits.SILENCE_S + 2)
    assert scene.owner.ended


@in_virtual_time
async def test_pings_are_answered_with_their_content(clock: VirtualClock) -> None:
    scene = Scene(clock)
    scene.hear(Kind.PING, encode(Ping(77)))
    await clock.sleep(0.1)
    assert [(kind, body) for _, kind, body in scene.wires[Channel.CONTROL].taken] == [(Kind.PONG, encode(Ping(77)))]


@in_virtual_time
async def test_malformed_frames_are_refused_and_counted(clock: VirtualClock) -> None:
    scene = Scene(clock)
    scene.hear(KIND, b"fine")
    scene.hear(Kind.HELLO, b"")
    scene.hear(9, b"")
    scene.hear(25, b"")
    scene.hear(Kind.PING, b"garbage")
    scene.hear(Kind.PING, encode(Ping(1)), Channel.BULK)
    scene.link.receive([b"one part"], Channel.CONTROL)
    scene._sequence[Channel.CONTROL] += 1
    scene.hear(KIND, b"still in step")
    scene.hear(KIND, b"", session=bytes(16))
    scene.hear(KIND, b"", sequence=99)
    assert scene.owner.refused == ["unknown-kind"] * 3 + ["bad-message", "unknown-kind", "bad-frame", "bad-session", "bad-sequence"]
    assert [body for _, body, _ in scene.owner.frames] == [b"fine", b"still in step"]
    assert not scene.link.worn_out
    for _ in range(2):
        scene.hear(9, b"")
    assert scene.link.worn_out


@in_virtual_time
async def test_control_flood_is_cut_and_bulk_is_not(clock: VirtualClock) -> None:
    scene = Scene(clock)
    for _ in range(int(limits.CONTROL_FRAMES_BURST) + 100):
        scene.hear(KIND, b"")
    assert scene.owner.refused == ["too-fast"] * 100
    assert not scene.link.worn_out, "being fast is no malformed message"
    scene.hear(KIND, b"", Channel.BULK)
    await clock.sleep(1)
    scene.hear(KIND, b"")
    assert len(scene.owner.frames) == limits.CONTROL_FRAMES_BURST + 2


@in_virtual_time
async def test_farewell_waits_for_both_channels(clock: VirtualClock) -> None:
    scene = Scene(clock)
    scene.hear(Kind.BYE, encode(bye_of("leave", "done for\x1b[31m today")))
    assert not scene.owner.ended
    assert not scene.link.send(KIND, b"", Channel.CONTROL)
    scene.hear(KIND, b"the last words", Channel.BULK)
    scene.hear(Kind.BYE, encode(bye_of("leave", "again")), Channel.BULK)
    assert scene.owner.ended == ["The peer left: done for?[31m today"]
    assert scene.owner.frames == [(KIND, b"the last words", Channel.BULK)]


@in_virtual_time
async def test_farewell_on_one_channel_is_enough_after_a_while(clock: VirtualClock) -> None:
    scene = Scene(clock)
    scene.hear(Kind.BYE, encode(bye_of("leave", "bulk is stuck")))
    await scene.ticks(limits.FAREWELL_S + 2)
    assert scene.owner.ended == ["The peer left: bulk is stuck"]


@in_virtual_time
async def test_goodbye_comes_last_and_the_link_ends_once(clock: VirtualClock) -> None:
    scene = Scene(clock)
    for channel in Channel:
        scene.link.send(KIND, b"before", channel)
    scene.link.goodbye("dropped", "enough")
    scene.link.goodbye("dropped", "enough")
    assert not scene.link.send(KIND, b"after", Channel.CONTROL)
    await clock.sleep(0.1)
    for wire in scene.wires.values():
        assert [kind for _, kind, _ in wire.taken] == [KIND, Kind.BYE]
    scene.link.connection_lost("closed by the peer")
    assert scene.link.finished.is_set()
    assert scene.owner.ended == ["enough"]


@in_virtual_time
async def test_lost_wire_ends_the_link(clock: VirtualClock) -> None:
    scene = Scene(clock)
    scene.wires[Channel.BULK].gone = True
    scene.link.send(KIND, b"", Channel.BULK)
    await clock.sleep(0.1)
    assert scene.owner.ended == ["The connection was lost."]
    assert not scene.failures


@in_virtual_time
async def test_bucket_accepts_its_rate(clock: VirtualClock) -> None:
    bucket = TokenBucket(10, clock, burst=5)
    assert [bucket.try_take(1) for _ in range(6)] == [True] * 5 + [False]
    await clock.sleep(0.2)
    assert [bucket.try_take(1) for _ in range(3)] == [True, True, False]
    await clock.sleep(100)
    assert bucket.reserve(25) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="positive"):
        TokenBucket(0, clock)
