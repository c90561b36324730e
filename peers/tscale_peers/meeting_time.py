"""What meetings cost: seconds in which a GPU waits for the exchange, by what it waits for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from tscale_net.ports import Clock

Cause = Literal["receive", "publish", "hash", "wait"]


class Seconds(NamedTuple):
    """Time in meetings. A meeting ends when the device has done what it was given, so its own work is contained."""

    receive: float = 0.0
    """Adding packets of others to basepoint and weights."""
    publish: float = 0.0
    """Capturing the displacement, taking up own packets; encoding, signing and logging too where no helper thread does it."""
    hash: float = 0.0
    """Holding on to the state; reading and hashing it too where no helper thread does it."""
    wait: float = 0.0
    """For the device, and for other threads that hold the exchange."""

    @property
    def total(self) -> float:
        return self.receive + self.publish + self.hash + self.wait

    def since(self, before: Seconds) -> Seconds:
        """What was added after `before`."""
        return Seconds(*(now - then for now, then in zip(self, before, strict=True)))


class MeetingTime:
    """Adds up. One thread at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.spent = Seconds()

    @contextmanager
    def of(self, cause: Cause) -> Iterator[None]:
        """Inside, time counts for `cause`."""
        begun = self._clock.now()
        try:
            yield
        finally:
            self.spent = self.spent._replace(**{cause: getattr(self.spent, cause) + self._clock.now() - begun})
