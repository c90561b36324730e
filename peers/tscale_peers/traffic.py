"""Bytes up and down since start, and how many a second.

Enters: the transport's count, now and then. Leaves: totals and averages.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tscale_net.ports import Moved
from tscale_peers import limits
from tscale_peers.share import RateAverage


@dataclass(slots=True)
class Traffic:
    """Totals of all links of this process."""

    up_bytes: int = 0
    down_bytes: int = 0
    up: RateAverage = field(default_factory=lambda: RateAverage(limits.traffic_time_constant_s))
    down: RateAverage = field(default_factory=lambda: RateAverage(limits.traffic_time_constant_s))
    _noted_at: float | None = None

    def note(self, moved: Moved, now: float) -> None:
        """Take in the present count."""
        if self._noted_at is not None:
            self.up.add(moved.sent_bytes - self.up_bytes, now - self._noted_at)
            self.down.add(moved.received_bytes - self.down_bytes, now - self._noted_at)
        self.up_bytes, self.down_bytes = moved.sent_bytes, moved.received_bytes
        self._noted_at = now
