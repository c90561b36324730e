"""Which peer records each neighbour has not been told yet. Pure state.

Enters: records as they become known here, links, what neighbours tell. Leaves: for each neighbour the records that are news to it.
Rule: what is learned goes into one journal, and each neighbour has a place in it; a record is told over a link once, by whichever end knows
it first, and of several records of one peer only the newest. A neighbour that states its links is told of an ordinary record by a few of
them only, whom the record's bytes choose; of its author's own word, and of what cannot wait, by all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tscale_net.ports import PeerId
from tscale_peers import limits

Newest = Callable[[PeerId], bytes | None]
"""Signed record of a peer as it is known here."""


FOR_ALL = -1
"""In place of a record's number: whoever knows it tells it."""


@dataclass(slots=True)
class _Reader:
    """One neighbour. `turn` of `turns`: our place among those who tell it, counted from 0."""

    place: int
    """In the journal, counted from its beginning: everything before it was taken up."""
    untold: dict[PeerId, None] = field(default_factory=dict)
    has: dict[PeerId, bytes] = field(default_factory=dict)
    """What it has told or was told last, of each peer."""
    turn: int = 0
    turns: int = 0
    """0: not known, we tell everything."""

    def is_ours(self, number: int) -> bool:
        """Is a record with this number ours to tell?"""
        return number == FOR_ALL or not self.turns or (number - self.turn) % self.turns < limits.record_tellers


class RecordNews:
    """See the module's head."""

    def __init__(self) -> None:
        self._journal: list[tuple[PeerId, int]] = []
        self._begin = 0
        """Entries that were dropped from the journal's head."""
        self._readers: dict[PeerId, _Reader] = {}

    def link_up(self, neighbour: PeerId, first: Iterable[PeerId]) -> None:
        """It is told of the peers `first`, and of whatever becomes known from now on."""
        self._readers[neighbour] = _Reader(self._begin + len(self._journal), dict.fromkeys(first))

    def link_down(self, neighbour: PeerId) -> None:
        self._readers.pop(neighbour, None)

    def share_turns(self, neighbour: PeerId, turn: int, turns: int) -> None:
        """This neighbour has `turns` links, of which ours is number `turn`; 0 turns: not known."""
        reader = self._readers.get(neighbour)
        if reader is not None:
            reader.turn, reader.turns = turn, turns

    def learned(self, peer: PeerId, number: int) -> None:
        """A newer record of this peer is known here; `number`: some bits of it, or FOR_ALL."""
        if not self._readers:
            return
        if len(self._journal) >= limits.records_journal:
            self._shorten()
        self._journal.append((peer, number))

    def tell(self, neighbour: PeerId, peers: Iterable[PeerId]) -> None:
        """Have these told to one neighbour, whatever it has said itself."""
        reader = self._readers.get(neighbour)
        if reader is not None:
            for peer in peers:
                reader.untold[peer] = None
                reader.has.pop(peer, None)

    def has(self, neighbour: PeerId, peer: PeerId, sealed: bytes) -> None:
        """A neighbour has told this record."""
        reader = self._readers.get(neighbour)
        if reader is not None:
            reader.has[peer] = sealed

    def next_for(self, neighbour: PeerId, newest: Newest) -> list[bytes]:
        """Records that this neighbour does not have, noted as told (bounded; the rest comes next time)."""
        reader = self._readers.get(neighbour)
        if reader is None:
            return []
        self._take_up(reader, neighbour)
        news: list[bytes] = []
        room = limits.records_bytes_max
        while reader.untold and len(news) < limits.records_per_message:
            peer = next(iter(reader.untold))
            sealed = newest(peer)
            if sealed is not None and sealed != reader.has.get(peer):
                if len(sealed) > room:
                    break
                room -= len(sealed)
                news.append(sealed)
                reader.has[peer] = sealed
            del reader.untold[peer]
        return news

    def has_more_for(self, neighbour: PeerId) -> bool:
        """Is it untold of anything taken up so far?"""
        reader = self._readers.get(neighbour)
        return reader is not None and bool(reader.untold)

    def _take_up(self, reader: _Reader, neighbour: PeerId) -> None:
        """Move the journal's entries from this neighbour's place on to what it is untold of."""
        new = self._journal[reader.place - self._begin :]
        if new:
            reader.untold.update(dict.fromkeys(peer for peer, number in new if peer != neighbour and reader.is_ours(number)))
            reader.place = self._begin + len(self._journal)

    def _shorten(self) -> None:
        """Begin a new journal; who is far behind takes up the old one now."""
        for neighbour, reader in self._readers.items():
            self._take_up(reader, neighbour)
        self._begin, self._journal = self._begin + len(self._journal), []

    def forget(self, peer: PeerId) -> None:
        """Nothing is known of this peer any more."""
        for reader in self._readers.values():
            reader.has.pop(peer, None)
