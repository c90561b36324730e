"""What a linked peer can do at worst, in virtual time: it is refused, cut off or ignored; nobody ends, and the swarm goes on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import pytest
import torch

from tscale_net.identity import Identity
from tscale_net.memory_transport import MemoryTransport
from tscale_net.ports import Channel, LinkDown
from tscale_net.virtual_time import run_virtual
from tscale_peers import limits, peer
from tscale_peers.applied import AppliedSet
from tscale_peers.herald import Herald
from tscale_peers.membership import State
from tscale_peers.messages import HAVE, PACKET, RECORDS, SUMMARY, WANT, Ranges, Records, Summary
from tscale_peers.packet import PACKET_VERSION, Header, Packet, stream_key
from tscale_peers.peer import SwarmPeer
from tscale_peers.records import PeerRecord, seal
from tscale_peers.simulation import SimulatedPeer, SimulatedSwarm, ToyAuthor, small_run


def simulate(scenario: Callable[[SimulatedSwarm], Awaitable[None]], **options: object) -> None:
    torch.set_num_threads(1)
    manifest, start = small_run(publish_every_steps=3)

    async def main(clock: object, rng: object) -> None:
        swarm = SimulatedSwarm(manifest, start, clock, rng, **options)  # type: ignore[arg-type]
        try:
            await scenario(swarm)
        finally:
            await swarm.end()

    run_virtual(main, 1)


def of(sim: SimulatedPeer) -> SwarmPeer:
    assert sim.peer is not None
    return sim.peer


class Attacker:
    """A linked peer of the run that says what it likes, with valid signatures of its own."""

    def __init__(self, swarm: SimulatedSwarm, transport: MemoryTransport, author: ToyAuthor, victim: SwarmPeer) -> None:
        self.swarm = swarm
        self.transport = transport
        self.author = author
        self.victim = victim

    def send(self, kind: int, body: bytes, channel: Channel = Channel.CONTROL) -> None:
        assert self.transport.send(self.victim.author.peer_id, kind, body, channel)

    def packet(self, stream: int, seq: int, chunk: int, batches: int) -> bytes:
        terms = self.swarm.run.terms
        where = terms.layout.chunks[chunk]
        payload = terms.codec.encode(torch.full((where.size,), 1e-3), where, 0.1)
        head = Header(PACKET_VERSION, terms.run, self.author.public_key, stream, seq, chunk, batches, 0.1, "sign", 0.0)
        return Packet.seal(head, payload, self.author.sign)

    def record(self, author: ToyAuthor, **changes: object) -> bytes:
        wall = self.swarm.clock.wall()
        base = PeerRecord(self.swarm.run.run, author.public_key, 5, 1, wall, "crowd", "peer", (), 1, 1, 1, 1.0, 1.0, b"", b"", False)
        return seal(msgspec.structs.replace(base, **changes), author.sign)

    def tell(self, *sealed: bytes) -> None:
        self.send(RECORDS, msgspec.msgpack.encode(Records(list(sealed))))


async def attacked(swarm: SimulatedSwarm, peers: int = 3) -> Attacker:
    """A swarm that trains, and an attacker linked to its second peer."""
    address = await swarm.found(swarm.add())
    for _ in range(peers - 1):
        await swarm.join(swarm.add(), address)
    await swarm.clock.sleep(5)
    victim = of(swarm.peers[1])
    author = ToyAuthor(Identity.from_seed(b"a" * 32))
    transport = swarm.network.transport(author.identity, "mallory", swarm.run.run)
    await transport.start()
    await transport.dial(victim.settings.addresses[0])
    return Attacker(swarm, transport, author, victim)


async def goes_on(swarm: SimulatedSwarm) -> None:
    """Everybody lives, publishes, agrees."""
    before = [p.published for p in swarm.living()]
    await swarm.clock.sleep(15)
    assert all(p.published > count for p, count in zip(swarm.living(), before, strict=True))
    assert len(swarm.living()) == len(swarm.peers)
    swarm.stand_still()
    await swarm.quiesce()


def test_absurd_batch_counts_end_nobody_and_hardly_move_the_schedule() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        attacker = await attacked(swarm)
        before = attacker.victim.swarm_batches()
        for stream in range(4):
            for chunk in range(2):
                attacker.send(PACKET, attacker.packet(stream, 1, chunk, limits.applied_seq_max), Channel.BULK)
        await swarm.clock.sleep(10)
        assert attacker.victim.meeting.replica.applied.total_batches() > 1 << 64
        for p in swarm.living():
            assert p.swarm_batches() < before + 4 * 3 * limits.batches_per_publication + 100
        await goes_on(swarm)

    simulate(scenario)


def test_records_as_long_as_they_may_be_are_told_on_in_messages_that_fit() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        attacker = await attacked(swarm)
        long = tuple("/dns4/" + "a" * (limits.record_max_address_chars - 6) for _ in range(limits.record_max_addresses))
        crowd = [ToyAuthor(Identity.from_seed(n.to_bytes(32, "big"))) for n in range(1, 100)]
        for n in range(0, len(crowd), 16):
            attacker.tell(*[attacker.record(author, addresses=long) for author in crowd[n : n + 16]])
        await swarm.clock.sleep(20)
        assert len(of(swarm.peers[0]).membership.book) > 90, "they were told on"
        await goes_on(swarm)

    simulate(scenario)


def test_a_crowd_of_invented_peers_pushes_out_no_linked_one_and_leaves_nothing_behind() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        attacker = await attacked(swarm)
        victim = attacker.victim
        digest, bits = victim.state
        for n in range(1, 3 * limits.record_book_peers):
            author = ToyAuthor(Identity.from_seed(n.to_bytes(32, "big")))
            attacker.tell(attacker.record(author, digest=digest, hash=bits if n % 2 else bytes(32)))
            if n % 16 == 0:
                await swarm.clock.sleep(0.25)
        await swarm.clock.sleep(limits.house_s * limits.house_most + 1)
        book = victim.membership.book
        assert len(book) == limits.record_book_peers
        assert all(p in book for p in victim.linked - {attacker.author.peer_id}) and victim.author.peer_id in book
        assert len(victim.membership.known()) <= limits.record_book_peers
        assert len(victim.agreement.agreeing | victim.agreement.differing) <= limits.record_book_peers
        assert len(victim.dialler.book.next_at) <= limits.record_book_peers

    simulate(scenario)


def test_scattered_wants_and_huge_claims_are_borne() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        attacker = await attacked(swarm)
        name = stream_key(attacker.author.public_key, 9)
        for start in range(0, 4000, 200):
            attacker.send(WANT, Ranges.of([(name, seq, 0) for seq in range(start + 1, start + 200)]).encode())
            attacker.send(HAVE, Ranges.of([(name, seq, 1) for seq in range(start + 1, start + 200)]).encode())
        everything = Ranges.of([(name, seq, 0) for seq in range(1, limits.keys_per_message)])
        attacker.send(WANT, everything.encode(), Channel.BULK)
        await swarm.clock.sleep(1)
        assert attacker.victim.board.refused["too-large"] == 0, "its answers fit in messages"
        claims = AppliedSet(2)
        claims.add(name, 1, 0)
        claims.streams[name].contiguous[:] = limits.applied_seq_max
        for _ in range(5):
            attacker.send(SUMMARY, msgspec.msgpack.encode(Summary(bytes(32), claims.encode())), Channel.BULK)
        await swarm.clock.sleep(40)
        assert attacker.victim.gossip.backlog() <= limits.wanted_per_neighbour
        await goes_on(swarm)

    simulate(scenario)


def test_who_sends_nothing_but_nonsense_is_cut_off_and_shown_once() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        attacker = await attacked(swarm)
        for _ in range(int(limits.strikes) + 20):
            attacker.send(HAVE, b"\xc1noise")
        await swarm.clock.sleep(5)
        events = []
        while not events or not isinstance(events[-1], LinkDown):
            events.append(await attacker.transport.next_event())
        assert attacker.author.peer_id not in attacker.victim.linked
        notices = [n for n in swarm.peers[1].notices if n.kind == "refused" and "cannot be read" in n.text]
        assert len(notices) == 1 and attacker.victim.board.refused["bad-message"] >= limits.strikes
        assert any("is cut" in n.text for n in swarm.peers[1].notices)
        await goes_on(swarm)

    simulate(scenario)


def test_a_peer_whose_clock_was_set_back_is_heard_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second life starts, by its own clock, before its first: without help all would take its records for old news, for ever."""

    class Earlier(Herald):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            self.incarnation = 7

    async def scenario(swarm: SimulatedSwarm) -> None:
        address = await swarm.found(swarm.add())
        back = swarm.add()
        await swarm.join(back, address)
        await swarm.clock.sleep(5)
        seed, me = of(swarm.peers[0]), back.author.peer_id
        swarm.kill(back)
        await swarm.clock.sleep(limits.dead_s + 5)
        assert seed.membership.state(me) is State.DEAD
        monkeypatch.setattr(peer, "Herald", Earlier)
        back.killed = False
        await swarm.join(back, address)
        await swarm.clock.sleep(3 * limits.heartbeat_s)
        assert seed.membership.state(me) is State.LIVE
        assert any(n.kind == "identity" for n in back.notices)
        heard = seed.membership.book.get(me)
        assert heard is not None and heard.record.incarnation > 7

    simulate(scenario)


def test_a_newcomer_does_not_take_old_records_for_living_peers() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        address = await swarm.found(swarm.add())
        gone = swarm.add()
        await swarm.join(gone, address)
        await swarm.clock.sleep(5)
        swarm.kill(gone)
        await swarm.clock.sleep(limits.record_old_s + 2 * limits.dead_s)
        newcomer = swarm.add()
        await swarm.join(newcomer, address)
        swarm.network.cut(newcomer.author.peer_id, swarm.peers[0].author.peer_id)
        await swarm.clock.sleep(8)
        assert of(newcomer).linked and gone.author.peer_id in of(newcomer).membership.book, "a new link tells of everybody"
        assert of(newcomer).membership.state(gone.author.peer_id) is State.DEAD
        assert len(of(newcomer).membership.live()) == 1

    simulate(scenario)
