"""What a link carries, found out by using it: how fast packets come while this peer is behind.

Enters: a count of bytes that only grows, and whether more was wanted than came, a few times a second. Leaves: bytes per second, or None
while nothing shows a bound. A link that is never behind says nothing about its bound: the swarm is then not limited by it.
An estimate is a measurement of the past: while the peer is not behind it rises by itself until it is forgotten, so that a peer that once
had a bad minute does not slow others for ever (the sawtooth of TCP, Jacobson 1988, in slow motion).
"""

from __future__ import annotations

import math

from tscale_peers import limits


class Capacity:
    """One direction of this peer's connection. `cap`: what its owner allows, bytes per second, None: no limit."""

    def __init__(self, cap: float | None, now: float) -> None:
        self.cap = cap
        self._found: float | None = None
        self._measured = 0.0
        """The last measurement: an estimate that has grown to many times this is forgotten."""
        self._behind_since: float | None = None
        self._bytes_then = 0.0
        self._noted_at = now

    def note(self, count_bytes: float, behind: bool, now: float) -> None:
        """The count stands here now; `behind`: more was wanted, all the time since the last call, than came."""
        passed_s, self._noted_at = now - self._noted_at, now
        if not behind:
            self._behind_since = None
            self._rise(passed_s)
        elif self._behind_since is None:
            self._behind_since, self._bytes_then = now, count_bytes
        elif now - self._behind_since >= limits.capacity_measure_s:
            self._measured = self._found = max(1.0, (count_bytes - self._bytes_then) / (now - self._behind_since))
            self._behind_since, self._bytes_then = now, count_bytes

    def _rise(self, passed_s: float) -> None:
        if self._found is None:
            return
        self._found *= math.exp(passed_s / limits.capacity_rise_s)
        if self._found > self._measured * limits.capacity_forgotten:
            self._found = None

    @property
    def bytes_per_s(self) -> float | None:
        """The lower of what was found and what is allowed; None if neither is known."""
        known = [value for value in (self.cap, self._found) if value is not None]
        return min(known, default=None)
