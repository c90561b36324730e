"""Lines that tell how far a bench is, each with the time since its start. Flushed at once: a bench that is stopped has told all it knew."""

from __future__ import annotations

import time

from tscale_fed.units import duration_text


class Progress:
    """One bench's clock and voice."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started

    def say(self, text: str) -> None:
        print(f"{duration_text(self.seconds):>6}  {text}", flush=True)
