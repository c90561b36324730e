"""Reach and news of records: who is there by the links that peers state, and who tells whom."""

from __future__ import annotations

import random

import msgspec

from tscale_net.identity import Identity, verify
from tscale_peers import limits
from tscale_peers.membership import Membership, State
from tscale_peers.reach import Reach
from tscale_peers.record_news import FOR_ALL, RecordNews
from tscale_peers.records import PeerRecord, RecordBook, seal

RUN = b"r" * 32


def identity(n: int) -> Identity:
    return Identity.from_seed(n.to_bytes(32, "big"))


def peer(n: int) -> str:
    return identity(n).peer_id


def node(n: int) -> bytes:
    return identity(n).public_key[: limits.node_bytes]


def sealed(n: int, *links: int, seq: int = 1, **changes: object) -> bytes:
    """Record of peer n that states links to these others."""
    record = PeerRecord(
        run=RUN, public_key=identity(n).public_key, incarnation=5, seq=seq, created_unix=1.0, name=f"peer-{n}", role="peer", addresses=(),
        step=0, batches=0, tokens=0, tokens_per_s=0.0, train_loss=2.0, digest=b"", hash=b"", leaving=False,
        links=tuple(sorted(map(node, links))),
    )  # fmt: skip
    return seal(msgspec.structs.replace(record, **changes), identity(n).sign)


def reached(*records: bytes, linked: tuple[int, ...] = (2,)) -> set[str]:
    book = RecordBook(RUN, verify)
    for record in records:
        book.learn(record, 0.0)
    reach = Reach(peer(1))
    assert reach.update(book, map(peer, linked), 0) and not reach.update(book, map(peer, linked), 0), "only news is worked out"
    return set(reach.peers)


# -- reach -----------------------------------------------------------------------------------------------------------------


def test_a_chain_of_links_reaches_everybody_on_it() -> None:
    assert reached(sealed(2, 1, 3), sealed(3, 2, 4), sealed(4, 3)) == {peer(2), peer(3), peer(4)}


def test_a_peer_that_only_speaks_of_itself_is_not_reached() -> None:
    """It may have died: its old record still states the link, its neighbour's newer one does not."""
    assert reached(sealed(2, 1), sealed(3, 2)) == {peer(2)}


def test_two_that_vouch_for_each_other_alone_are_gone_together() -> None:
    assert reached(sealed(2, 1), sealed(3, 4), sealed(4, 3)) == {peer(2)}


def test_of_a_peer_that_cannot_name_all_its_links_the_other_ends_word_counts() -> None:
    many = range(100, 100 + limits.record_max_links)
    assert peer(3) in reached(sealed(2, *many), sealed(3, 2))
    assert peer(3) not in reached(sealed(2, *many[1:]), sealed(3, 2))


# -- what membership makes of it --------------------------------------------------------------------------------------------


def members(*records: bytes, linked: tuple[int, ...] = (2,)) -> Membership:
    """Peer 1 in a swarm of about 28, where records are renewed every 24 seconds."""
    m = Membership(peer(1), RecordBook(RUN, verify), random.Random(0))
    for n in linked:
        m.link_up(peer(n))
    for record in (*records, *(sealed(n) for n in range(50, 75))):
        m.learn(record, 0.0)
    return m


def test_reached_peers_stay_live_without_a_word_of_their_own() -> None:
    m = members(sealed(2, 1, 3), sealed(3, 2))
    for now in range(0, int(limits.dead_s * 4), 5):
        m.learn(sealed(2, 1, 3, seq=2 + now), float(now))
        m.tick(float(now))
    assert m.state(peer(3)) is State.LIVE


def test_whom_nobody_states_any_more_is_suspect_then_dead() -> None:
    m = members(sealed(2, 1, 3), sealed(3, 2))
    m.tick(50.0)
    m.learn(sealed(2, 1, seq=2), 50.0)
    m.tick(50.1)
    assert m.state(peer(3)) is State.LIVE
    for silent_s, state in ((limits.suspect_s, State.SUSPECT), (limits.dead_s, State.DEAD)):
        m.tick(50.0 + silent_s - 0.1)
        assert m.state(peer(3)) is not state
        m.tick(50.0 + silent_s)
        assert m.state(peer(3)) is state
    m.learn(sealed(2, 1, 3, seq=3), 66.0)
    m.learn(sealed(3, 2, seq=2), 66.0)
    m.tick(66.0)
    assert m.state(peer(3)) is State.LIVE


def test_stated_links_alone_do_not_keep_up_the_dead() -> None:
    """A liar may state a link to a dead peer for ever; its record grows old all the same."""
    m = members(sealed(2, 1, 3), sealed(3, 2))
    for now in range(0, 200, 5):
        m.learn(sealed(2, 1, 3, seq=2 + now), float(now))
        m.tick(float(now))
    assert m.state(peer(2)) is State.LIVE and m.state(peer(3)) is State.DEAD


# -- who tells whom --------------------------------------------------------------------------------------------------------


def told(news: RecordNews, to: str) -> list[bytes]:
    return news.next_for(to, lambda p: p.encode())


def test_a_record_crosses_a_link_once() -> None:
    news = RecordNews()
    news.link_up("a", ())
    news.link_up("b", ())
    news.learned("x", FOR_ALL)
    news.has("a", "x", b"x")
    assert told(news, "a") == [] and told(news, "b") == [b"x"] and told(news, "b") == []
    news.learned("b", FOR_ALL)
    assert told(news, "b") == [], "nobody is told of itself"


def test_an_ordinary_record_is_told_by_a_few_and_each_number_by_others() -> None:
    turns = 9
    for number in range(20):
        tellers = []
        for turn in range(turns):
            news = RecordNews()
            news.link_up("a", ())
            news.share_turns("a", turn, turns)
            news.learned("x", number)
            tellers += [turn] if told(news, "a") else []
            news.learned("y", FOR_ALL)
            assert told(news, "a") == [b"y"]
        assert len(tellers) == limits.record_tellers and number % turns in tellers


def test_a_long_journal_is_cut_and_loses_nothing() -> None:
    news = RecordNews()
    news.link_up("a", ())
    for n in range(limits.records_journal + 10):
        news.learned(f"peer {n % 20}", FOR_ALL)
    assert sorted(told(news, "a")) == sorted(f"peer {n}".encode() for n in range(20))
    assert not news.has_more_for("a")


def test_more_than_a_message_holds_comes_next_time() -> None:
    news = RecordNews()
    news.link_up("a", [f"peer {n}" for n in range(limits.records_per_message + 3)])
    assert len(told(news, "a")) == limits.records_per_message and news.has_more_for("a")
    assert len(told(news, "a")) == 3 and not news.has_more_for("a")
