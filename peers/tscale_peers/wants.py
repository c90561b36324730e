"""Packets that are known to exist and are not here: who offers each, and of whom it was asked until when. Pure state.

Enters: offers, arrivals, denials, the time. Leaves: whom to ask for what now; packets that nobody keeps any more.
Each packet is asked of one neighbour at a time. A neighbour has a window of packets asked of it and not yet here: it grows with each
delivery and is halved when a deadline passes (as TCP does it), so a slow neighbour, or one that promises and does not deliver, soon holds
up one packet at a time. What one neighbour may put on the list is bounded, so that nobody's lies crowd out the others' truth.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from tscale_net.ports import PeerId
from tscale_peers import limits
from tscale_peers.packet import Key


@dataclass(slots=True)
class _Wanted:
    owner: PeerId
    """Who offered it first: it counts against that neighbour's bound. Empty once that link is gone."""
    offers: dict[PeerId, None] = field(default_factory=dict)
    denied: set[PeerId] = field(default_factory=set)
    """Who offered it and does not keep it any more."""
    asked_of: PeerId | None = None
    deadline: float = 0.0
    tries: int = 0


@dataclass(slots=True)
class _Source:
    """One linked neighbour. `queue`: what it offers and nobody was asked for yet (and some that somebody was, which are passed over)."""

    queue: OrderedDict[Key, None] = field(default_factory=OrderedDict)
    owned: int = 0
    in_flight: int = 0
    window: int = limits.first_packets_in_flight


class WantList:
    """See the module's head."""

    def __init__(self) -> None:
        self._wanted: dict[Key, _Wanted] = {}
        self._asked: OrderedDict[Key, None] = OrderedDict()
        """In the order of their deadlines."""
        self._denied: dict[Key, None] = {}
        """Nobody offers them any more, and somebody said that it has thrown them away."""
        self._sources: dict[PeerId, _Source] = {}

    def __len__(self) -> int:
        return len(self._wanted)

    def __contains__(self, key: Key) -> bool:
        return key in self._wanted

    def window(self, peer: PeerId) -> int:
        """How many packets this neighbour may owe at present."""
        return self._sources[peer].window

    # -- links -------------------------------------------------------------------------------------------------------

    def link_up(self, peer: PeerId) -> None:
        self.link_down(peer)
        self._sources[peer] = _Source()

    def link_down(self, peer: PeerId) -> None:
        """Its offers are void; what it owes is asked of others."""
        if self._sources.pop(peer, None) is None:
            return
        for key, wanted in list(self._wanted.items()):
            if wanted.owner == peer:
                wanted.owner = ""
            if peer in wanted.offers or peer in wanted.denied:
                wanted.offers.pop(peer, None)
                wanted.denied.discard(peer)
                if wanted.asked_of == peer:
                    self._unask(key, wanted)
                self._rest(key, wanted)

    # -- what neighbours say -----------------------------------------------------------------------------------------

    def offer(self, key: Key, peer: PeerId) -> bool:
        """A linked neighbour has it. False if it is taken no notice of: the neighbour's part of the list is full."""
        source = self._sources[peer]
        wanted = self._wanted.get(key)
        if wanted is None:
            if source.owned >= limits.wanted_per_neighbour:
                return False
            source.owned += 1
            wanted = self._wanted[key] = _Wanted(peer)
        wanted.denied.discard(peer)
        if peer not in wanted.offers:
            wanted.offers[peer] = None
            self._denied.pop(key, None)
            if wanted.asked_of is None:
                source.queue[key] = None
        return True

    def arrived(self, key: Key, source: PeerId | None = None) -> None:
        """It is here, from `source` if that is a neighbour."""
        wanted = self._wanted.get(key)
        if wanted is None:
            return
        asked = wanted.asked_of
        if asked is not None and asked == source:
            self._sources[asked].window = min(limits.packets_in_flight, self._sources[asked].window + 1)
        self._forget(key, wanted)

    def denies(self, key: Key, peer: PeerId) -> None:
        """A neighbour does not keep it any more. Counts only if it had offered it."""
        wanted = self._wanted.get(key)
        if wanted is not None and peer in wanted.offers:
            wanted.denied.add(peer)
            self._withdraw(key, wanted, peer)

    def no_good(self, key: Key, peer: PeerId, blame: bool = True) -> None:
        """What a neighbour sent under this key was refused: it is not asked for it again unless it offers it again. `blame`: it may owe one
        packet at a time from now on, until it has delivered."""
        wanted = self._wanted.get(key)
        if wanted is not None and peer in wanted.offers:
            if blame:
                self._sources[peer].window = 1
            self._withdraw(key, wanted, peer)

    def forget(self, is_known: Callable[[Key], bool]) -> None:
        """Drop what is known by now."""
        for key, wanted in list(self._wanted.items()):
            if is_known(key):
                self._forget(key, wanted)

    # -- whom to ask -------------------------------------------------------------------------------------------------

    def asks(self, now: float, may_ask: Callable[[], bool] = lambda: True) -> dict[PeerId, list[Key]]:
        """What to ask of whom now, in turn, as far as their windows reach and `may_ask`, called for each packet, allows; noted as asked."""
        self._expire(now)
        ask: dict[PeerId, list[Key]] = {}
        ready = [peer for peer, source in self._sources.items() if source.queue and source.in_flight < source.window]
        while ready:
            ready = [peer for peer in ready if self._ask_one(peer, now, ask, may_ask)]
        return ask

    def _ask_one(self, peer: PeerId, now: float, ask: dict[PeerId, list[Key]], may_ask: Callable[[], bool]) -> bool:
        """Ask this neighbour for the oldest packet that it offers and nobody owes. False if there is no more, or no more room."""
        source = self._sources[peer]
        while source.queue and source.in_flight < source.window:
            key = next(iter(source.queue))
            wanted = self._wanted[key]
            if wanted.asked_of is None and not may_ask():
                return False
            del source.queue[key]
            if wanted.asked_of is None:
                wanted.asked_of, wanted.deadline = peer, now + limits.want_timeout_s
                self._asked[key] = None
                source.in_flight += 1
                ask.setdefault(peer, []).append(key)
                return True
        return False

    def _expire(self, now: float) -> None:
        """Deadlines that have passed: others come first; a neighbour that is the only one is asked a few times."""
        late: set[PeerId] = set()
        while self._asked:
            key = next(iter(self._asked))
            wanted = self._wanted[key]
            if now < wanted.deadline:
                break
            peer = wanted.asked_of
            assert peer is not None
            late.add(peer)
            self._unask(key, wanted)
            wanted.tries += 1
            if len(wanted.offers) > 1 or wanted.tries >= limits.want_tries:
                del wanted.offers[peer]
            self._rest(key, wanted)
        for peer in late:
            self._sources[peer].window = max(1, self._sources[peer].window // 2)

    @property
    def any_denied(self) -> bool:
        """Whether there is anything that all who had it have thrown away."""
        return bool(self._denied)

    @property
    def obtainable(self) -> int:
        """How many packets somebody offers: a lie that nobody can deliver is nothing to wait for."""
        return len(self._wanted) - len(self._denied)

    def unobtainable(self, believed: Callable[[set[PeerId]], bool] = bool) -> tuple[list[Key], set[PeerId]]:
        """Packets that all who had them have thrown away, if those neighbours are `believed`, and these neighbours; forgotten here."""
        keys = [key for key in self._denied if believed(self._wanted[key].denied)]
        peers = {peer for key in keys for peer in self._wanted[key].denied}
        for key in keys:
            self._forget(key, self._wanted[key])
        return keys, peers

    # -- inside ------------------------------------------------------------------------------------------------------

    def _withdraw(self, key: Key, wanted: _Wanted, peer: PeerId) -> None:
        del wanted.offers[peer]
        self._sources[peer].queue.pop(key, None)
        if wanted.asked_of == peer:
            self._unask(key, wanted)
        self._rest(key, wanted)

    def _unask(self, key: Key, wanted: _Wanted) -> None:
        source = self._sources.get(wanted.asked_of) if wanted.asked_of else None
        if source is not None:
            source.in_flight -= 1
        wanted.asked_of = None
        self._asked.pop(key, None)

    def _rest(self, key: Key, wanted: _Wanted) -> None:
        """Put a packet where it belongs after something about it has changed."""
        if wanted.asked_of is not None:
            return
        for peer in wanted.offers:
            self._sources[peer].queue[key] = None
        if wanted.offers:
            return
        if wanted.denied:
            self._denied[key] = None
        else:
            self._forget(key, wanted)  # offered again if anybody has it

    def _forget(self, key: Key, wanted: _Wanted) -> None:
        self._unask(key, wanted)
        for peer in wanted.offers:
            self._sources[peer].queue.pop(key, None)
        owner = self._sources.get(wanted.owner)
        if owner is not None:
            owner.owned -= 1
        self._denied.pop(key, None)
        del self._wanted[key]
