"""A token bucket on an injected clock: for limits of upload and download (wait) and for floods (refuse).

Enters: a rate in units per second. Leaves: how long to wait, or whether to accept. Waiters are served in the order in which they reserve.
"""

from __future__ import annotations

from tscale_net import limits
from tscale_net.ports import Clock


class TokenBucket:
    """Fills at `rate_per_s` up to `burst` units (default: a quarter of a second's worth)."""

    def __init__(self, rate_per_s: float, clock: Clock, burst: float | None = None) -> None:
        if not rate_per_s > 0:
            raise ValueError(f"a rate is positive, not {rate_per_s}")
        self.rate_per_s = rate_per_s
        self.burst = burst if burst is not None else rate_per_s * limits.UPLOAD_BURST_S
        self._clock = clock
        self._level = self.burst
        self._updated_s = clock.now()

    def _fill(self) -> None:
        now_s = self._clock.now()
        self._level = min(self.burst, self._level + (now_s - self._updated_s) * self.rate_per_s)
        self._updated_s = now_s

    def reserve(self, units: float) -> float:
        """Take units, possibly on credit, and return the seconds to wait until they are earned."""
        self._fill()
        self._level -= units
        return max(0.0, -self._level / self.rate_per_s)

    def try_borrow(self, units: float) -> bool:
        """Take units if there are any at all, the rest on credit: what is larger than the burst gets through as well, just less often."""
        self._fill()
        if self._level <= 0:
            return False
        self._level -= units
        return True

    def try_take(self, units: float) -> bool:
        """Take units if they are there."""
        self._fill()
        if self._level < units:
            return False
        self._level -= units
        return True
