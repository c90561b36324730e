"""Ctrl+C, once and twice.

Enters: SIGINT and SIGTERM. Leaves: a flag and a line on stderr after the first, KeyboardInterrupt at the second: once means "end in
order", twice "stop now".
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

STDERR_DESCRIPTOR = 2
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """A context manager for the main thread of a program without an event loop; the earlier handlers come back at its end."""

    def __init__(self, answer: str) -> None:
        """`answer` tells the user at once what the first signal brought about; empty for a process that another one speaks for."""
        self.stop = False
        """True after the first signal: finish what you are doing, then end."""
        self._answer = answer
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        # Straight to the descriptor: the interrupted code may hold the lock of a stream or console, and would wait for itself.
        if self._answer:
            os.write(STDERR_DESCRIPTOR, f"{self._answer}\n".encode())
