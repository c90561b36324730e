"""The suite that every implementation of `Transport` passes: what peer logic may rely on, as code.

Enters: an `Arena` that makes started peers on one network. Leaves: nothing, or an AssertionError that names the promise.

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
    async def test_conformance(case):
        await case(MyArena())
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from tscale_net.errors import Refused
from tscale_net.frames import body_limit
from tscale_net.ports import Channel, Clock, Frame, LinkDown, LinkUp, Transport, WireRefusal

WAIT_S = 30.0
"""How long a promised event may take before the case fails."""
KIND = 40
RUN_A, RUN_B = bytes([1]) * 32, bytes([2]) * 32

E = TypeVar("E", LinkUp, LinkDown, Frame, WireRefusal)


class Arena(Protocol):
    """One network with as many peers as a case asks for."""

    clock: Clock

    async def peer(self, number: int, *, name: str = "", run: bytes = b"") -> tuple[Transport, str]:
        """A started transport and the address that others dial. The same number is the same identity."""
        ...

    def unreachable(self) -> str:
        """An address where nobody listens, with a peer id."""
        ...


async def expect(transport: Transport, kind: type[E]) -> E:
    """The next event of a kind; others are skipped."""
    async with asyncio.timeout(WAIT_S):
        while True:
            event = await transport.next_event()
            if isinstance(event, kind):
                return event


async def refusal_of(wanted: Awaitable[object]) -> Refused:
    """The refusal that an awaitable ends in."""
    try:
        await wanted
    except Refused as refused:
        assert refused.detail.strip(), "a refusal has a sentence"
        return refused
    raise AssertionError("nothing was refused")


async def both_ends_learn_of_a_link(arena: Arena) -> None:
    """A dial queues LinkUp on both sides, with name, run and direction."""
    (one, _), (two, address) = await arena.peer(1, name="one", run=RUN_A), await arena.peer(2, name="two")
    assert await one.dial(address) == two.peer_id
    up_one, up_two = await expect(one, LinkUp), await expect(two, LinkUp)
    assert (up_one.peer, up_one.name, up_one.run, up_one.outgoing) == (two.peer_id, "two", b"", True)
    assert (up_two.peer, up_two.name, up_two.run, up_two.outgoing) == (one.peer_id, "one", RUN_A, False)
    assert [link.peer for link in one.links()] == [two.peer_id]
    assert [link.name for link in two.links()] == ["one"]


async def messages_keep_their_order(arena: Arena) -> None:
    """Each channel delivers what was sent, in order, in both directions; empty and largest bodies included."""
    one, two = await _linked(arena)
    for sender, receiver in ((one, two), (two, one)):
        for channel in Channel:
            bodies = [b"", b"x" * body_limit(channel), *(number.to_bytes(4, "little") for number in range(50))]
            for body in bodies:
                assert sender.send(receiver.peer_id, KIND, body, channel)
            for body in bodies:
                frame = await expect(receiver, Frame)
                assert (frame.peer, frame.kind, frame.channel) == (sender.peer_id, KIND, channel)
                assert frame.body == body


async def dialling_twice_makes_one_link(arena: Arena) -> None:
    """A second dial returns at once; two at the same time share one link."""
    (one, _), (two, address) = await arena.peer(1), await arena.peer(2)
    assert await asyncio.gather(one.dial(address), one.dial(address)) == [two.peer_id] * 2
    assert await one.dial(address) == two.peer_id
    assert one.send(two.peer_id, KIND, b"only one")
    await expect(one, LinkUp)
    await expect(two, LinkUp)
    assert (await two.next_event(), len(two.links())) == (Frame(one.peer_id, KIND, b"only one", Channel.CONTROL), 1)


async def crossing_dials_make_one_link(arena: Arena) -> None:
    """When both sides dial at once exactly one link is kept and no side sees it end."""
    (one, address_one), (two, address_two) = await arena.peer(1), await arena.peer(2)
    await asyncio.gather(one.dial(address_two), two.dial(address_one))
    assert one.send(two.peer_id, KIND, b"to two") and two.send(one.peer_id, KIND, b"to one")
    events = [[await one.next_event(), await one.next_event()], [await two.next_event(), await two.next_event()]]
    assert [[type(event) for event in queue] for queue in events] == [[LinkUp, Frame]] * 2
    assert len(one.links()) == len(two.links()) == 1
    assert one.links()[0].outgoing != two.links()[0].outgoing


async def another_run_is_refused(arena: Arena) -> None:
    """Two runs do not mix; both sides are told. A peer without a run may link to any."""
    (one, _), (two, address), (three, _) = await arena.peer(1, run=RUN_A), await arena.peer(2, run=RUN_B), await arena.peer(3)
    assert (await refusal_of(one.dial(address))).code == "wrong-run"
    assert (await expect(two, WireRefusal)).code == "wrong-run"
    assert not one.links() and not two.links()
    assert await three.dial(address) == two.peer_id


async def another_identity_is_refused(arena: Arena) -> None:
    """An address with the id of somebody else leads to no link."""
    (one, _), (two, address), (three, _) = await arena.peer(1), await arena.peer(2), await arena.peer(3)
    forged = address.replace(two.peer_id, three.peer_id)
    assert (await refusal_of(one.dial(forged))).code == "wrong-key"
    assert not one.links() and not two.links()


async def impossible_addresses_are_refused(arena: Arena) -> None:
    """Garbage, oneself, and a place where nobody listens: each with its own reason."""
    one, address = await arena.peer(1)
    assert (await refusal_of(one.dial("here"))).code == "bad-address"
    assert (await refusal_of(one.dial(address))).code == "self"
    assert (await refusal_of(one.dial(arena.unreachable()))).code == "unreachable"


async def send_refuses_what_it_cannot_carry(arena: Arena) -> None:
    """No link: False. Too large: Refused. A kind of the transport's own: ValueError."""
    one, two = await _linked(arena)
    assert not one.send(one.peer_id, KIND, b"to nobody")
    for channel in Channel:
        try:
            one.send(two.peer_id, KIND, bytes(body_limit(channel) + 1), channel)
            raise AssertionError("an oversized body was accepted")
        except Refused as refused:
            assert refused.code == "too-large"
    for kind in (1, 31, 256):
        try:
            one.send(two.peer_id, kind, b"")
            raise AssertionError("a reserved kind was accepted")
        except ValueError:
            pass


async def a_drop_tells_both_sides(arena: Arena) -> None:
    """The other side reads the reason; both queue LinkDown; both may link again."""
    one, two = await _linked(arena)
    one.drop(two.peer_id, "you are too slow")
    assert not one.send(two.peer_id, KIND, b"late")
    down_one, down_two = await expect(one, LinkDown), await expect(two, LinkDown)
    assert (down_one.peer, down_two.peer) == (two.peer_id, one.peer_id)
    assert "too slow" in down_two.reason
    assert not one.links() and not two.links()
    _, address = await arena.peer(3)
    assert await one.dial(address)


async def a_ban_lasts_as_long_as_it_says(arena: Arena) -> None:
    """A banned peer is not let in, and is again when the time is over."""
    (one, _), (two, address) = await arena.peer(1), await arena.peer(2)
    await one.dial(address)
    await expect(two, LinkUp)
    two.drop(one.peer_id, "malformed packets", ban_s=0.7)
    await expect(one, LinkDown)
    assert (await refusal_of(one.dial(address))).code == "not-admitted"
    await arena.clock.sleep(0.8)
    assert await one.dial(address) == two.peer_id


async def a_close_delivers_what_was_sent(arena: Arena) -> None:
    """With linger, queued messages arrive before the farewell; then the transport is closed for good, and closing again is allowed."""
    one, two = await _linked(arena)
    for number in range(20):
        assert one.send(two.peer_id, KIND, bytes([number]) * 100_000, Channel.BULK)
    await one.close(linger_s=5.0)
    await one.close()
    for number in range(20):
        assert (await expect(two, Frame)).body == bytes([number]) * 100_000
    assert "left" in (await expect(two, LinkDown)).reason
    assert not one.send(two.peer_id, KIND, b"")
    assert (await refusal_of(one.dial(arena.unreachable()))).code == "closed"
    while True:
        try:
            await one.next_event()
        except Refused as refused:
            assert refused.code == "closed"
            return


async def cancelling_next_event_loses_nothing(arena: Arena) -> None:
    """An event that comes when a reader was cancelled is there for the next reader."""
    one, two = await _linked(arena)
    for number in range(20):
        reader = asyncio.ensure_future(two.next_event())
        await asyncio.sleep(0)
        one.send(two.peer_id, KIND, bytes([number]))
        if number % 2:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            event = await expect(two, Frame)
        else:
            event_or_other = await asyncio.wait_for(reader, WAIT_S)
            assert isinstance(event_or_other, Frame)
            event = event_or_other
        assert event.body == bytes([number])


async def _linked(arena: Arena) -> tuple[Transport, Transport]:
    (one, _), (two, address) = await arena.peer(1), await arena.peer(2)
    await one.dial(address)
    await expect(one, LinkUp)
    await expect(two, LinkUp)
    return one, two


Case = Callable[[Arena], Awaitable[None]]
CASES: tuple[Case, ...] = (
    both_ends_learn_of_a_link,
    messages_keep_their_order,
    dialling_twice_makes_one_link,
    crossing_dials_make_one_link,
    another_run_is_refused,
    another_identity_is_refused,
    impossible_addresses_are_refused,
    send_refuses_what_it_cannot_carry,
    a_drop_tells_both_sides,
    a_ban_lasts_as_long_as_it_says,
    a_close_delivers_what_was_sent,
    cancelling_next_event_loses_nothing,
)


async def transport_conformance(make_arena: Callable[[], Arena]) -> None:
    """Run every case on a fresh arena."""
    for case in CASES:
        await case(make_arena())
