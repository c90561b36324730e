"""Real sockets on loopback: ports, the hello door, first contact, and sentences for everything that fails."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from net_kit import ZmqArena, identity

from tscale_net import limits, sockets
from tscale_net.address import parse
from tscale_net.address_book import AddressBook
from tscale_net.conformance import expect, refusal_of
from tscale_net.dialler import probe, resolve
from tscale_net.errors import Refused
from tscale_net.messages import DOOR_DOMAIN, DoorBody, DoorReply, decode
from tscale_net.ports import Channel, Frame, LinkDown, LinkUp


@pytest.fixture
async def arena() -> AsyncIterator[ZmqArena]:
    made = ZmqArena()
    yield made
    await made.close()


def bare(address: str) -> str:
    return parse(address).host_port


async def test_taken_port_is_refused_with_the_fix(arena: ZmqArena) -> None:
    _, address = await arena.peer(1)
    port = parse(address).port
    refused = await refusal_of(arena.make(2, listen=f"127.0.0.1:{port}").start())
    assert refused.code == "port-taken"
    assert str(port) in refused.detail and "--listen" in refused.detail
    # The door's port counts as well, and nothing is left listening on the other.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        door_port = taken.getsockname()[1]
        refused = await refusal_of(arena.make(3, listen=f"127.0.0.1:{door_port - 1}").start())
        assert refused.code == "port-taken" and str(door_port) in refused.detail
        sockets.listening_socket("127.0.0.1", door_port - 1).close()


async def test_any_port_is_the_next_free_pair(arena: ZmqArena) -> None:
    ports = [parse((await arena.peer(number))[1]).port for number in (1, 2, 3)]
    assert len(set(ports)) == 3
    assert all(limits.DEFAULT_PORT <= port < limits.DEFAULT_PORT + 2 * limits.PORT_PAIRS_TRIED and port % 2 == 0 for port in ports)


@pytest.mark.parametrize(
    ("listen", "code"),
    [("192.0.2.1:7700", "cannot-listen"), ("127.0.0.1:65535", "cannot-listen"), ("7700", "bad-address"), ("x:y", "bad-address")],
)
async def test_impossible_listen_addresses(arena: ZmqArena, listen: str, code: str) -> None:
    assert (await refusal_of(arena.make(1, listen=listen).start())).code == code


async def test_peer_that_only_dials_listens_nowhere(arena: ZmqArena) -> None:
    shy = arena.make(1, listen=None)
    assert await shy.start() == []
    other, address = await arena.peer(2)
    await shy.dial(address)
    await expect(other, LinkUp)
    assert other.send(shy.peer_id, 40, b"hello", Channel.BULK)
    assert (await expect(shy, Frame)).body == b"hello"


async def test_advertised_addresses(arena: ZmqArena) -> None:
    peer = arena.make(1, advertise=["seed.example.net:7700", "203.0.113.5:80"])
    assert await peer.start() == [
        f"/dns4/seed.example.net/tcp/7700/p2p/{peer.peer_id}",
        f"/ip4/203.0.113.5/tcp/80/p2p/{peer.peer_id}",
    ]
    everywhere = arena.make(2, listen="0.0.0.0:0")
    (address,) = await everywhere.start()
    assert parse(address).host != "0.0.0.0"


async def test_first_contact_is_pinned_and_reported(arena: ZmqArena, tmp_path: Path) -> None:
    two, address = await arena.peer(2)
    told: list[str] = []
    book = AddressBook(tmp_path / "known_peers")
    one = arena.make(1, listen=None, address_book=book, on_first_contact=lambda contact: told.append(str(contact)))
    await one.start()
    for _ in range(2):
        assert await one.dial(bare(address)) == two.peer_id
    assert len(told) == len(one.first_contacts) == 1
    assert two.peer_id in told[0] and str(book.path) in told[0]
    assert book.pinned(bare(address)) == two.peer_id


async def test_changed_identity_is_refused_as_ssh_does(arena: ZmqArena, tmp_path: Path) -> None:
    two, address = await arena.peer(2)
    book = AddressBook(tmp_path / "known_peers")
    book.pin(bare(address), identity(9).peer_id, 1.0)
    one = arena.make(1, listen=None, address_book=book)
    await one.start()
    refused = await refusal_of(one.dial(bare(address)))
    assert refused.code == "changed-id"
    assert str(book.path) in refused.detail and two.peer_id in refused.detail
    assert not one.links()


async def test_nobody_there_says_what_was_tried(arena: ZmqArena) -> None:
    one, _ = await arena.peer(1)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    refused = await refusal_of(one.dial(f"{identity(5).peer_id}@localhost:{port}"))
    assert refused.code == "unreachable"
    for part in ("localhost", "127.0.0.1", str(port), "connection refused", "check"):
        assert part in refused.detail
    refused = await refusal_of(one.dial(f"localhost:{port}"))
    assert refused.code == "needs-id"
    assert str(port + 1) in refused.detail and "ID@" in refused.detail
    refused = await refusal_of(one.dial("does-not-exist.invalid:7700"))
    assert refused.code == "unreachable" and "does-not-exist.invalid" in refused.detail


async def test_something_else_listens_there(arena: ZmqArena) -> None:
    one, _ = await arena.peer(1)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    refused = await refusal_of(one.dial(f"{identity(5).peer_id}@127.0.0.1:{port}"))
    assert refused.code == "wrong-key" and "Check port and id" in refused.detail
    refused = await refusal_of(one.dial(f"127.0.0.1:{port - 1}"))
    assert refused.code in ("too-large", "bad-message", "needs-id")
    server.close()


async def test_cancelled_dial_leaves_nothing_behind(arena: ZmqArena) -> None:
    one, two = arena.make(1, listen=None), arena.make(2)
    await one.start()
    address = (await two.start())[0]
    before = len(asyncio.all_tasks())
    for turns in range(40):
        dial = asyncio.get_running_loop().create_task(one.dial(address))
        for _ in range(turns):
            await asyncio.sleep(0)
        dial.cancel()
        await asyncio.gather(dial, return_exceptions=True)
        for peer in [link.peer for link in one.links()]:
            one.drop(peer, "again")
    async with asyncio.timeout(20):
        while len(asyncio.all_tasks()) > before or one.links():
            for link in one.links():
                one.drop(link.peer, "again")
            await asyncio.sleep(0.05)
    assert await one.dial(address) == two.peer_id


@pytest.mark.parametrize("turns", [0, 1, 3])
async def test_closing_right_after_a_drop_leaves_no_socket_open(arena: ZmqArena, turns: int) -> None:
    """An open socket would keep the context from ending, and close() with it."""
    one, two = arena.make(1, listen=None), arena.make(2)
    await one.start()
    await one.dial((await two.start())[0])
    link = next(iter(one._sessions.links.values()))
    link.finished.wait = asyncio.Event().wait  # type: ignore[method-assign]  # the far end never reads the BYE
    one.drop(two.peer_id, "goodbye")
    for _ in range(turns):
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await one.close()


async def test_two_hundred_crossings_never_flap(arena: ZmqArena) -> None:
    (one, address_one), (two, address_two) = await arena.peer(1), await arena.peer(2)
    for turn in range(200):
        dials = [one.dial(address_two), two.dial(address_one)]
        await asyncio.gather(*(dials if turn % 2 else dials[::-1]))
        await expect(one, LinkUp)
        await expect(two, LinkUp)
        assert len(one.links()) == len(two.links()) == 1
        assert one.send(two.peer_id, 40, bytes([turn])) and two.send(one.peer_id, 40, bytes([turn]))
        for peer in (one, two):
            event = await peer.next_event()
            assert isinstance(event, Frame) and event.body == bytes([turn]), event
        one.drop(two.peer_id, "next turn")
        await expect(one, LinkDown)
        await expect(two, LinkDown)


async def test_words_for_network_problems() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert "nothing listens" in await probe("127.0.0.1", closed.getsockname()[1])
    assert await resolve(parse("localhost:1")) != []
    with pytest.raises(Refused, match="could not be resolved"):
        await resolve(parse("/dns6/does-not-exist.invalid/tcp/1"))


def test_old_libzmq_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import zmq

    monkeypatch.setattr(zmq, "zmq_version_info", lambda: (4, 3, 4))
    with pytest.raises(Refused, match="pip install"):
        sockets.new_context()


async def test_ipv6_loopback(arena: ZmqArena) -> None:
    one, two = arena.make(1, listen=None), arena.make(2, listen="[::1]:0")
    try:
        address = (await two.start())[0]
    except Refused as refused:
        pytest.skip(f"no IPv6 here: {refused}")
    await one.start()
    assert address.startswith("/ip6/::1/tcp/")
    assert await one.dial(address) == two.peer_id
    assert (await expect(two, LinkUp)).address.startswith("[::1]:")
    again = arena.make(3, listen=None)
    assert await again.dial(bare(address)) == two.peer_id


async def _read_framed(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(2), "little"))


async def test_a_newer_door_is_refused_for_its_version(arena: ZmqArena) -> None:
    one, _ = await arena.peer(1)
    newer = identity(5)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonce = msgspec.msgpack.decode(await _read_framed(reader))[2]
        body = msgspec.msgpack.encode([newer.public_key, nonce, 0, 2, 3, "of another", ["form"]])
        reply = msgspec.msgpack.encode([body, newer.sign(DOOR_DOMAIN, body)])
        writer.write(len(reply).to_bytes(2, "little") + reply)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    refused = await refusal_of(one.dial(f"127.0.0.1:{server.sockets[0].getsockname()[1] - 1}"))
    assert refused.code == "version" and "2 to 3" in refused.detail
    server.close()


async def test_the_door_answers_a_newer_question_with_its_own_versions(arena: ZmqArena) -> None:
    _, address = await arena.peer(1)
    target = parse(address)
    reader, writer = await asyncio.open_connection(target.host, target.port + 1)
    question = msgspec.msgpack.encode([2, 3, bytes(16), "a field of a later version"])
    writer.write(len(question).to_bytes(2, "little") + question)
    body = decode(DoorBody, decode(DoorReply, await _read_framed(reader)).body)
    assert (body.protocol_min, body.protocol_max) == (limits.PROTOCOL_MIN, limits.PROTOCOL_MAX)
    writer.close()
