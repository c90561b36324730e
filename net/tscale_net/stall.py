"""A process that stands still for a while, in virtual time: what SIGSTOP, a busy disk or a sleeping laptop does to a peer.

Enters: for how long. Leaves: awaited, the moment at which the process goes on. Its clock runs on, and its links stand, as real ones would.
"""

from __future__ import annotations

from tscale_net.ports import Clock


class Stall:
    """Of one process. Whatever the process awaits passes through `over` before it goes on."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until_s = 0.0

    def hold(self, seconds: float) -> None:
        """Stand still from now on for so long, or longer if it stands still already."""
        self._until_s = max(self._until_s, self._clock.now() + seconds)

    async def over(self) -> None:
        """Returns at once if the process runs."""
        while (left_s := self._until_s - self._clock.now()) > 0:
            await self._clock.sleep(left_s)


class StallingClock:
    """The clock of a process that can stand still. `ahead_s`: by how much its wall clock is wrong."""

    def __init__(self, clock: Clock, stall: Stall, ahead_s: float = 0.0) -> None:
        self._clock = clock
        self._stall = stall
        self._ahead_s = ahead_s

    def now(self) -> float:
        return self._clock.now()

    def wall(self) -> float:
        return self._clock.wall() + self._ahead_s

    async def sleep(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
        await self._stall.over()
