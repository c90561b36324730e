"""Times one row of `bench step`.

Enters: a row's name. Leaves: a `Timed`: the time of every step, memory, losses; or the sentence that says why there are none.
Between steps only an event is recorded, so nothing waits that would not wait in training.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tscale_fed.bench.kernel_profile import kernel_lines
from tscale_fed.bench.machine import resident_bytes
from tscale_fed.bench.step_rows import Row, RowOptions, Say, Sizes, make_row
from tscale_net.errors import Refused

RATE = 0.01
_STEPS_BETWEEN_CHECKS = 10
"""Time is looked at this often: looking means waiting for the device."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One row."""

    name: str
    milliseconds: list[float] = field(default_factory=list)
    """Of every timed step."""
    start_s: float = 0.0
    """Building, compiling, first steps."""
    peak_bytes: int = 0
    """Of GPU memory in tensors, from the first step on."""
    reserved_bytes: int = 0
    """Of GPU memory that torch holds."""
    host_bytes: int = 0
    """Of host memory that the row took for weights and momentum."""
    grown_bytes: int = 0
    """By which the process grew while the row was built and stepped: compilers and torch itself too."""
    losses: tuple[float, float] = (0.0, 0.0)
    """Mean per token of the first and of the last step."""
    facts: dict[str, Any] = field(default_factory=dict)
    failure: str = ""

    @property
    def median_ms(self) -> float:
        return statistics.median(self.milliseconds) if self.milliseconds else float("nan")


def measure(
    name: str, sizes: Sizes, batches: list[tuple[Tensor, Tensor]], options: RowOptions, say: Say,
    *, steps: int, warm_up: int, seconds: float, top: int, keep: Callable[[Timed], None],
) -> None:  # fmt: skip
    """Build a row, step it, tell. A row that cannot run is a result, not an error. `keep` gets the figures as soon as they are there:
    before the profile of `top` kernels (0 = none), which may take longer than somebody waits."""
    forget()
    host_before = resident_bytes()
    started = time.perf_counter()
    try:
        row = make_row(name, sizes, batches, options, say)
        if sizes.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(sizes.device)  # start weights are gone, as they are in training
        first = float(row.step(0, RATE)) / sizes.step_tokens
        for index in range(1, warm_up):
            row.step(index, RATE)
        _wait(sizes.device)
        start_s = time.perf_counter() - started
        milliseconds, last = _time(row, sizes, steps, warm_up, seconds)
    except (Refused, torch.OutOfMemoryError, ImportError) as error:
        say(f"{name}: {error}")
        keep(Timed(name, failure=str(error).splitlines()[0]))
        return
    on_gpu = sizes.device.type == "cuda"
    timed = Timed(
        name, milliseconds, start_s,
        torch.cuda.max_memory_allocated(sizes.device) if on_gpu else 0, torch.cuda.max_memory_reserved(sizes.device) if on_gpu else 0,
        row.facts().get("host_bytes", 0), max(0, resident_bytes() - host_before), (first, last), row.facts(),
    )  # fmt: skip
    rate = sizes.step_tokens / timed.median_ms * 1e3
    say(f"{name}: {timed.median_ms:.2f} ms, {rate:,.0f} tokens/s, started in {start_s:.0f} s; {timed.facts.get('plan', '')}")
    keep(timed)
    if top and on_gpu:
        print("\n".join([f"-- {name}", *kernel_lines(lambda: row.step(0, RATE), top)]), flush=True)
    row.close()


def forget() -> None:
    """Give back what the last row held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _time(row: Row, sizes: Sizes, steps: int, first_index: int, seconds: float) -> tuple[list[float], float]:
    """(milliseconds of every step, mean loss per token before the last one)."""
    milliseconds: list[float] = []
    loss: Tensor | float = 0.0
    started = time.perf_counter()
    while len(milliseconds) < steps and time.perf_counter() - started < seconds:
        stamps = [_Stamp(sizes.device)]
        for _ in range(min(_STEPS_BETWEEN_CHECKS, steps - len(milliseconds))):
            loss = row.step(first_index + len(milliseconds) + len(stamps) - 1, RATE)
            stamps.append(_Stamp(sizes.device))
        _wait(sizes.device)
        milliseconds += [before.milliseconds_to(after) for before, after in zip(stamps, stamps[1:], strict=False)]
    return milliseconds, float(loss) / sizes.step_tokens


class _Stamp:
    """A moment on the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._moment = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def milliseconds_to(self, later: _Stamp) -> float:
        if self._event is not None and later._event is not None:
            return float(self._event.elapsed_time(later._event))
        return (later._moment - self._moment) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
