"""Background tasks with an owner: they are named, ended together, and an unexpected error reaches somebody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class TaskOwner:
    """Starts tasks and is responsible for their end.

    `on_error` is called with the exception of any task that fails; cancellation is no failure.
    """

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        self._tasks: dict[asyncio.Task[Any], None] = {}  # a dict keeps the order of starting; sets do not
        self._on_error = on_error

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Start a task."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_error(error)

    def __len__(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        """Cancel all and wait until they have ended. A task that closes its own owner is spared."""
        rest = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
