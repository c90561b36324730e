"""Far behind: packets from logs, or snapshot chunks? Whichever is fewer bytes, chunk by chunk. Pure state.

Enters: what a neighbour has and this peer lacks, how many neighbours there are, the time. Leaves: chunks to fetch as snapshots and from
whom; chunks whose packets are not asked for meanwhile.
Rule: if much is missing, a chunk is fetched if its missing packets are more bytes than the chunk. Three things are asked first:
- nothing is lost by it: what this peer has and the neighbour lacks is in the own log, from which it is added again;
- neighbours agree: as many as must vouch for a snapshot (or all, if there are fewer) lack far less than this peer does, one of them has
  work of its own in what is known here. A stranger's word is not enough to replace what was checked packet by packet;
- it was not tried lately. If it was and packets are still missing, they come from logs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tscale_net.ports import PeerId
from tscale_peers import limits
from tscale_peers.packet import Terms


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes of one packet, and of a snapshot, of each chunk."""

    packet_bytes: Sequence[int]
    chunk_bytes: Sequence[int]

    @staticmethod
    def of(terms: Terms) -> Costs:
        chunks = terms.layout.chunks
        packets = [limits.packet_header_max_bytes + terms.codec_of(chunk).max_payload_bytes(chunk) for chunk in chunks]
        return Costs(packets, [limits.chunk_header_max_bytes + 4 * chunk.size for chunk in chunks])


@dataclass(slots=True)
class _Doubt:
    """A chunk of which much is missing. `vouchers`: neighbour -> is it an author?"""

    since: float
    vouchers: dict[PeerId, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`fetch`: chunks to fetch now, from `sources`. `leave`: chunks whose packets are not to be asked for."""

    fetch: tuple[int, ...] = ()
    sources: tuple[PeerId, ...] = ()
    leave: frozenset[int] = frozenset()


class CatchUp:
    """See the module's head."""

    def __init__(self, costs: Costs, least_bytes: int = limits.catch_up_least_bytes) -> None:
        self.fetching: set[int] = set()
        """Chunks that are being fetched; whoever fetches them takes them out."""
        self._costs = costs
        self._least_bytes = least_bytes
        self._doubts: dict[int, _Doubt] = {}
        self._tried_at: dict[int, float] = {}

    def weigh(
        self, peer: PeerId, missing: Mapping[int, int], is_author: bool, neighbours: int, recoverable: Callable[[int], bool], now: float
    ) -> Verdict:
        """missing: packets of each chunk that `peer` has and this one lacks. recoverable: is everything of a chunk that the neighbour lacks
        in the own log?"""
        self._doubts = {chunk: doubt for chunk, doubt in self._doubts.items() if now - doubt.since < limits.catch_up_forgotten_s}
        fetch: list[int] = []
        leave = set(self.fetching)
        if sum(count * self._costs.packet_bytes[chunk] for chunk, count in missing.items()) < self._least_bytes:
            return Verdict(leave=frozenset(leave))
        for chunk, count in missing.items():
            if chunk in leave or not self._is_dear(chunk, count) or self._tried_lately(chunk, now):
                continue
            if not recoverable(chunk):
                continue
            doubt = self._doubts.setdefault(chunk, _Doubt(now))
            doubt.vouchers[peer] = is_author
            if len(doubt.vouchers) >= min(limits.snapshot_witnesses, neighbours) and any(doubt.vouchers.values()):
                fetch.append(chunk)
                leave.add(chunk)
            elif now - doubt.since < limits.catch_up_patience_s:
                leave.add(chunk)
        sources = self._begin(fetch, now)
        return Verdict(tuple(sorted(fetch)), sources, frozenset(leave))

    def _begin(self, fetch: Sequence[int], now: float) -> tuple[PeerId, ...]:
        sources: set[PeerId] = set()
        for chunk in fetch:
            sources |= {peer for peer, is_author in self._doubts.pop(chunk).vouchers.items() if is_author}
            self._tried_at[chunk] = now
        self.fetching |= set(fetch)
        return tuple(sorted(sources))

    def _is_dear(self, chunk: int, count: int) -> bool:
        return count * self._costs.packet_bytes[chunk] > self._costs.chunk_bytes[chunk]

    def _tried_lately(self, chunk: int, now: float) -> bool:
        return now - self._tried_at.get(chunk, -limits.catch_up_again_s) < limits.catch_up_again_s
