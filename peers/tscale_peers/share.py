"""The share phi: which part of the swarm's work is mine, from everybody's stated tokens per second.

phi = own rate / sum of the rates of live peers, never below a floor (a joiner's average starts at 0 and would otherwise publish nothing).
The author fixes c = s * phi in its packet, so a wrong phi changes how fast displacement drains, never what is conserved; receivers only
check that c is within the run's limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tscale_peers import limits


@dataclass(slots=True)
class RateAverage:
    """Exponential moving average of a rate. Starts at 0: a newcomer has done nothing yet."""

    time_constant_s: float = limits.rate_time_constant_s
    per_s: float = 0.0

    def add(self, amount: float, seconds: float) -> float:
        """`amount` was done in the last `seconds`; returns the new average per second."""
        if seconds <= 0:
            return self.per_s
        weight = -math.expm1(-seconds / self.time_constant_s)
        self.per_s += weight * (amount / seconds - self.per_s)
        return self.per_s


class CountedRate:
    """Feeds an average from a count that only grows, at most every `tick_s`."""

    def __init__(self, average: RateAverage, now: float) -> None:
        self._average = average
        self._count: float | None = None
        self._at = now

    def note(self, count: float, now: float) -> None:
        """The count stands here now. The first one only sets the start."""
        if self._count is None:
            self._count, self._at = count, now
        if now - self._at >= limits.tick_s:
            self._average.add(count - self._count, now - self._at)
            self._count, self._at = count, now


def share(own_per_s: float, others_per_s: Iterable[float]) -> float:
    """phi in [floor, 1]. Alone: 1. Nobody has a rate yet: equal parts."""
    others = list(others_per_s)
    total = own_per_s + sum(others)
    phi = own_per_s / total if total > 0 else 1.0 / (1 + len(others))
    return min(1.0, max(phi, limits.min_share))
