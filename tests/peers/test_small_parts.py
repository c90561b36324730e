"""The small parts around the shell: notices, agreement, traffic, conduct, allowances, dialling."""

from __future__ import annotations

import asyncio
import random

from test_membership import RUN, identity, members, sealed

from tscale_net.errors import Refused
from tscale_net.identity import verify
from tscale_net.ports import Moved, PeerId
from tscale_peers import limits
from tscale_peers.agreement import Agreement
from tscale_peers.allowance import Allowance
from tscale_peers.conduct import NOT_ITS_FAULT, Conduct
from tscale_peers.dialler import DialBook, Dialler
from tscale_peers.membership import Membership
from tscale_peers.notices import NoticeBoard
from tscale_peers.records import PeerRecord, open_sealed
from tscale_peers.traffic import Traffic


class HandClock:
    """Moves only when told to."""

    time = 0.0

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return 1e9 + self.time

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing here may sleep")


def board() -> tuple[NoticeBoard, HandClock]:
    clock = HandClock()
    return NoticeBoard(clock), clock


def record(n: int, **changes: object) -> PeerRecord:
    return open_sealed(sealed(identity(n), **changes), RUN, verify)  # type: ignore[arg-type]


# -- notices -----------------------------------------------------------------------------------------------------------


def test_all_refusals_are_counted_and_the_same_one_is_shown_now_and_then() -> None:
    notices, clock = board()
    for _ in range(1000):
        notices.refuse(Refused("bad-message", "noise"), "mallory")
    notices.refuse(Refused("bad-message", "noise"), "trudy")
    notices.refuse(Refused("bad-record", "noise"), "mallory")
    assert notices.refused == {"bad-message": 1001, "bad-record": 1} and len(notices.notices) == 3
    clock.time = limits.refusal_notice_s
    notices.refuse(Refused("bad-message", "noise"), "mallory")
    assert notices.notices[-1].text.endswith("(999 more of this kind)")
    for n in range(3 * limits.refusals_remembered):
        notices.refuse(Refused("bad-message", "noise"), f"name {n}")
    assert len(notices._shown) == limits.refusals_remembered and len(notices.notices) == limits.notices_kept


# -- agreement ---------------------------------------------------------------------------------------------------------


def test_agreement_compares_with_all_recent_states_and_forgets_who_is_gone() -> None:
    notices, _ = board()
    agreement = Agreement(notices)
    recent = [(b"1" * 32, b"x" * 32), (b"2" * 32, b"y" * 32)]
    agreement.compare(record(2, digest=b"1" * 32, hash=b"x" * 32), recent, 1.0)
    agreement.compare(record(3, digest=b"2" * 32, hash=b"!" * 32), recent, 1.0)
    agreement.compare(record(3, digest=b"2" * 32, hash=b"!" * 32), recent, 2.0)
    agreement.compare(record(4, digest=b"3" * 32), recent, 1.0)
    agreement.compare(record(5, digest=b"", hash=b""), [(b"", b"")], 1.0)
    assert set(agreement.agreeing) == {identity(2).peer_id} and set(agreement.differing) == {identity(3).peer_id}
    assert notices.refused == {"hash-mismatch": 1} and [n.kind for n in notices.notices] == ["agree", "diverged"]
    agreement.compare(record(3, digest=b"2" * 32, hash=b"y" * 32), recent, 3.0)
    assert not agreement.differing
    agreement.forget(lambda peer: peer == identity(3).peer_id)
    assert set(agreement.agreeing) == {identity(3).peer_id}


# -- traffic -----------------------------------------------------------------------------------------------------------


def test_traffic_shows_totals_and_averages() -> None:
    traffic = Traffic()
    for second, moved in enumerate((Moved(10, 1), Moved(60, 21), Moved(110, 41))):
        traffic.note(moved, float(second))
    assert (traffic.up_bytes, traffic.down_bytes) == (110, 41)
    assert 0 < traffic.down.per_s < traffic.up.per_s < 50


# -- allowances and conduct --------------------------------------------------------------------------------------------


def test_an_allowance_refills_and_never_beyond_its_burst() -> None:
    allowance = Allowance(2.0, 10.0)
    assert allowance.take(10, 0.0) and not allowance.take(1, 0.0)
    assert allowance.take(2, 1.0) and not allowance.take(0.1, 1.0)
    assert not allowance.take(11, 1e6) and allowance.take(10, 1e6)
    assert not allowance.take(1, 0.0), "a clock that goes back gives nothing"


def test_patience_ends_for_nonsense_and_not_for_what_is_no_fault() -> None:
    conduct = Conduct()
    nonsense = Refused("bad-message", "")
    assert not any(conduct.strike("a", nonsense, 0.0) for _ in range(int(limits.strikes)))
    assert conduct.strike("a", nonsense, 0.0) and not conduct.strike("b", nonsense, 0.0)
    for code in NOT_ITS_FAULT:
        assert not any(conduct.strike("b", Refused(code, ""), 0.0) for _ in range(200))
    assert not any(conduct.strike("c", nonsense, float(second)) for second in range(1000)), "one now and then is forgiven"
    conduct.link_down("a")
    assert not conduct.strike("a", nonsense, 0.0)


# -- dialling ----------------------------------------------------------------------------------------------------------


class DialledTransport:
    """Notes what is dialled; all of it fails but `works`."""

    def __init__(self, works: str = "") -> None:
        self.dialled: list[str] = []
        self.works = works

    async def dial(self, address: str) -> PeerId:
        self.dialled.append(address)
        if address != self.works:
            raise Refused("unreachable", f"{address} does not answer")
        return address.rpartition("/")[2]


def dialler(transport: DialledTransport, membership: Membership, *bootstrap: str) -> tuple[Dialler, NoticeBoard, HandClock]:
    notices, clock = board()
    return Dialler(transport, membership, bootstrap, notices, clock, random.Random(1), lambda p: p[-4:]), notices, clock  # type: ignore[arg-type]


async def tick(d: Dialler, linked: set[PeerId]) -> None:
    async with asyncio.TaskGroup() as tasks:
        d.tick(linked, tasks)


def test_back_off_doubles_up_to_its_bound_and_is_forgotten_with_the_peer() -> None:
    book, rng = DialBook(), random.Random(1)
    waits = []
    for _ in range(12):
        book.failed("a", 0.0, rng)
        waits.append(book.next_at["a"])
    assert waits[0] <= 1.5 * limits.redial_first_s and waits[-1] <= 1.5 * limits.redial_max_s
    assert all(wait >= 0.5 * min(limits.redial_max_s, limits.redial_first_s * 2**n) for n, wait in enumerate(waits))
    assert not book.may("a", 0.0) and book.may("b", 0.0)
    book.forget(lambda peer: False)
    assert book.may("a", 0.0) and not book.failures and not book.next_at


async def test_only_addresses_that_name_their_peer_are_dialled() -> None:
    """A record must not send its readers to somebody else's door."""
    m, who = members(), identity(2)
    mine = f"/ip4/10.0.0.1/tcp/7700/p2p/{who.peer_id}"
    others = f"/ip4/10.0.0.2/tcp/7700/p2p/{identity(3).peer_id}"
    m.learn(sealed(who, addresses=(others, "10.0.0.3:80", mine)), 0.0)
    m.tick(0.0)
    transport = DialledTransport(works=mine)
    d, notices, _ = dialler(transport, m)
    await tick(d, set())
    assert transport.dialled == [mine] and not notices.notices
    m.learn(sealed(who, 2, addresses=(others,)), 0.0)
    await tick(d, set())
    assert transport.dialled == [mine] and d.book.failures == {who.peer_id: 1}
    await tick(d, set())
    assert d.book.failures == {who.peer_id: 1}, "not tried again at once"


async def test_given_addresses_are_tried_for_ever_at_their_pace_and_failures_of_peers_told_once() -> None:
    m, who = members(), identity(2)
    m.learn(sealed(who, addresses=(f"/ip4/10.0.0.1/tcp/7700/p2p/{who.peer_id}",)), 0.0)
    m.tick(0.0)
    transport = DialledTransport()
    d, notices, clock = dialler(transport, m, "seed:7700")
    for _ in range(400):
        await tick(d, set())
        clock.time += 1.0
    alone, pace = transport.dialled.count("seed:7700"), limits.bootstrap_alone_redial_s
    assert 400 / pace - 1 <= alone <= 400 / pace + 1
    assert sum("seed:7700" in n.text for n in notices.notices) == 1
    assert sum(who.peer_id[-4:] in n.text for n in notices.notices) == 1
    before = len(transport.dialled)
    await tick(d, {f"peer {n}" for n in range(limits.links_target)})
    assert len(transport.dialled) == before, "enough links stand"


def test_records_of_one_neighbour_are_bounded() -> None:
    m, neighbour = members(), identity(9).peer_id
    m.link_up(neighbour)
    known = sealed(identity(2))
    m.learn(known, 0.0, neighbour)
    flooded = 0
    for _ in range(2000):
        try:
            m.learn(known, 0.0, neighbour)
        except Refused as refusal:
            flooded += refusal.code == "flood"
    assert flooded == 2001 - limits.records_burst
    assert m.learn(sealed(identity(3)), 0.0, "somebody else") is not None
