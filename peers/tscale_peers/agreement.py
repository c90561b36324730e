"""Do our replicas hold the same bits? Equal applied digests must mean equal basepoint hashes.

Enters: own recent (digest, hash) pairs and the pairs in others' records. Leaves: who agrees, who differs. Peers never stand still, so the
last few own pairs are kept and a pair of another peer is compared with all of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from tscale_net.ports import PeerId
from tscale_peers import limits
from tscale_peers.notices import NoticeBoard
from tscale_peers.records import PeerRecord


class Agreement:
    """`agreeing`: peer -> time of the last equal pair. `differing`: peer -> digest at which its bits differed from ours."""

    def __init__(self, board: NoticeBoard) -> None:
        self.agreeing: dict[PeerId, float] = {}
        self.differing: dict[PeerId, bytes] = {}
        self._board = board
        self._recent: tuple[bytes, bytes] | None = None
        self._hashes: OrderedDict[bytes, bytes] = OrderedDict()
        """Of own states, by digest, oldest first, as of the newest `_recent`."""

    def __len__(self) -> int:
        """Peers that are remembered; one that did both counts twice."""
        return len(self.agreeing) + len(self.differing)

    def forget(self, is_known: Callable[[PeerId], bool]) -> None:
        """Keep only peers that are still known."""
        for peers in (self.agreeing, self.differing):
            for peer in [peer for peer in peers if not is_known(peer)]:
                del peers[peer]

    def compare(self, record: PeerRecord, recent: Sequence[tuple[bytes, bytes]], now: float) -> None:
        """Compare another peer's latest pair with our recent ones, the newest last. Another thread may append to `recent`."""
        newest = recent[-1] if recent else None
        if newest is not self._recent:
            self._recent = newest
            self._hashes.update(tuple(recent))
            while len(self._hashes) > limits.states_remembered:
                self._hashes.popitem(last=False)
        mine = self._hashes.get(record.digest)
        if mine is None or not record.digest:
            return
        if mine == record.hash:
            self._agrees(record, now)
        elif self.differing.get(record.peer) != record.digest:
            self._differs(record, mine)

    def _agrees(self, record: PeerRecord, now: float) -> None:
        if record.peer not in self.agreeing:
            self._board.tell("agree", f"basepoint {record.hash.hex()[:8]} agrees bit for bit with {record.name}")
        self.agreeing[record.peer] = now
        self.differing.pop(record.peer, None)

    def _differs(self, record: PeerRecord, mine: bytes) -> None:
        self.differing[record.peer] = record.digest
        self._board.refused["hash-mismatch"] += 1
        theirs, ours = record.hash.hex()[:8], mine.hex()[:8]
        self._board.tell("diverged", f"{record.name} has the same deltas but other bits ({theirs}, here {ours}): one of us is wrong")
