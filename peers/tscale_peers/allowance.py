"""How much of something one neighbour may cause: a budget that refills with time. Pure: the time is passed in.

Enters: a rate per second and a burst; requests. Leaves: granted or not.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Allowance:
    """Starts full: the first `burst` units are free, then `rate_per_s`."""

    rate_per_s: float
    burst: float
    _level: float = field(init=False)
    _at: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._level = self.burst

    def take(self, units: float, now: float) -> bool:
        """Take `units` if they are there; a refusal takes nothing."""
        self._level = min(self.burst, self._level + max(0.0, now - self._at) * self.rate_per_s)
        self._at = now
        if units > self._level:
            return False
        self._level -= units
        return True
