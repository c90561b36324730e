"""An asyncio event loop whose time jumps: hours of a swarm in seconds, the same every time.

Enters: a coroutine. Leaves: its result. When nothing is ready the clock jumps to the next timer; when nothing is scheduled either, the
program waits for something that can never come, and that is an error (`Deadlock`) instead of a hang.
Real sockets and threads do not exist on this loop. With seeded randomness a run depends on nothing but its code: not on wall time, and
not on hash seeds as long as the code iterates over no sets of strings.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple, Unpack

from tscale_net.ports import Rng

WALL_START_S = 1_750_000_000.0
"""Unix time at which virtual runs begin."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Deadlock(RuntimeError):
    """Every task waits and no timer is set."""


class VirtualLoop(asyncio.BaseEventLoop):
    """The loop; `time()` is virtual seconds since its start.

    Of asyncio's own loop only the turning is replaced: there are no sockets to ask, timers are kept in the order in which they were set,
    and a turn costs a few microseconds, which is most of what a large simulation spends.
    """

    _ready: deque[asyncio.Handle]

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timers_set = 0

    def time(self) -> float:
        return self._now

    def call_later(
        self, delay: float, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._timers_set += 1
        heapq.heappush(self._timers, (when, self._timers_set, handle))
        return handle

    def call_soon_threadsafe(self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None) -> asyncio.Handle:
        """There are no other threads."""
        return self.call_soon(callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is passed over when its time comes."""

    def _run_once(self) -> None:
        """What is ready, else what is due next."""
        ready, timers = self._ready, self._timers
        if not ready:
            self._jump()
            now = self._now
            while timers and timers[0][0] <= now:
                ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def _jump(self) -> None:
        """To the next timer that still stands."""
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not timers:
            raise Deadlock(f"at {self._now:.3f} s nothing is scheduled; waiting: {self._waiting()}")
        self._now = max(self._now, timers[0][0])

    def _waiting(self) -> str:
        tasks = sorted(task.get_name() for task in asyncio.all_tasks(self))
        return ", ".join(tasks[:20]) or "nothing"


class VirtualClock:
    """`Clock` of the running virtual loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        return self._loop.time()

    def wall(self) -> float:
        return WALL_START_S + self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


Main = Callable[[VirtualClock, Rng], Coroutine[Any, Any, T]]


def run_virtual(main: Coroutine[Any, Any, T] | Main[T], seed: int = 0) -> T:
    """Run `main` in virtual time and return its result; what it left running is cancelled.

    `main` is a coroutine, or a function that is given the clock and a generator seeded by `seed`. Raises Deadlock.
    """
    loop = VirtualLoop()
    try:
        asyncio.set_event_loop(loop)
        coroutine = main(VirtualClock(loop), random.Random(seed)) if callable(main) else main
        try:
            return loop.run_until_complete(coroutine)
        finally:
            _cancel_rest(loop)
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _cancel_rest(loop: VirtualLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
