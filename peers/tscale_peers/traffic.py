"""Bytes up and down since start, over links that come and go.

Enters: the transport's live links, now and then. Leaves: totals. A link's own counters start at zero with each session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tscale_net.ports import LinkInfo, PeerId
from tscale_peers import limits
from tscale_peers.share import RateAverage


@dataclass(slots=True)
class Traffic:
    """Totals of all links of this process."""

    up_bytes: int = 0
    down_bytes: int = 0
    up: RateAverage = field(default_factory=lambda: RateAverage(limits.traffic_time_constant_s))
    down: RateAverage = field(default_factory=lambda: RateAverage(limits.traffic_time_constant_s))
    _seen: dict[PeerId, tuple[int, int]] = field(default_factory=dict)
    _noted_at: float | None = None

    def note_if_due(self, links: Callable[[], Iterable[LinkInfo]], now: float) -> None:
        """`note`, at most every `traffic_s`."""
        if self._noted_at is None or now - self._noted_at >= limits.traffic_s:
            self.note(links(), now)

    def note(self, links: Iterable[LinkInfo], now: float) -> None:
        """Take in the present counters."""
        before = (self.up_bytes, self.down_bytes)
        self._count(links)
        if self._noted_at is not None:
            self.up.add(self.up_bytes - before[0], now - self._noted_at)
            self.down.add(self.down_bytes - before[1], now - self._noted_at)
        self._noted_at = now

    def _count(self, links: Iterable[LinkInfo]) -> None:
        seen = {}
        for link in links:
            up, down = self._seen.get(link.peer, (0, 0))
            fresh = link.up_bytes < up or link.down_bytes < down
            self.up_bytes += link.up_bytes - (0 if fresh else up)
            self.down_bytes += link.down_bytes - (0 if fresh else down)
            seen[link.peer] = (link.up_bytes, link.down_bytes)
        self._seen = seen
