"""An asyncio event loop whose time jumps: hours of a swarm in seconds, the same every time.

Enters: a coroutine. Leaves: its result. When nothing is ready the clock jumps to the next timer; when nothing is scheduled either, the
program waits for something that can never come, and that is an error (`Deadlock`) instead of a hang.
Real sockets and threads do not exist on this loop. With seeded randomness a run depends on nothing but its code: not on wall time, and
not on hash seeds as long as the code iterates over no sets of strings.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from tscale_net.ports import Rng

WALL_START_S = 1_750_000_000.0
"""Unix time at which virtual runs begin."""
_LEAST_JUMP_S = 1e-9

T = TypeVar("T")


class Deadlock(RuntimeError):
    """Every task waits and no timer is set."""


class _NoSelector(selectors.BaseSelector):
    """Stands where the operating system would be asked for ready sockets; moves the clock instead."""

    def __init__(self) -> None:
        self.now = 0.0
        self._keys: dict[int, selectors.SelectorKey] = {}
        self.loop: asyncio.AbstractEventLoop | None = None

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = selectors.SelectorKey(fileobj, number, events, data)
        self._keys[number] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj if isinstance(fileobj, int) else fileobj.fileno())

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock(f"at {self.now:.3f} s nothing is scheduled; waiting: {self._waiting()}")
        if timeout > 0:
            self.now += max(timeout, _LEAST_JUMP_S)
        return []

    def _waiting(self) -> str:
        tasks = sorted(task.get_name() for task in asyncio.all_tasks(self.loop)) if self.loop else []
        return ", ".join(tasks[:20]) or "nothing"

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys

    def close(self) -> None:
        self._keys.clear()


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop; `time()` is virtual seconds since its start."""

    def __init__(self) -> None:
        self._virtual = _NoSelector()
        super().__init__(self._virtual)
        self._virtual.loop = self

    def time(self) -> float:
        return self._virtual.now


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
