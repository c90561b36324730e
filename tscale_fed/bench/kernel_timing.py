"""Device time of one call: a CUDA graph of many calls over rotating buffers, replayed; the median over the replays.

Enters: the same work as several closures, each on its own buffers, so that no call finds its data in the L2 cache. Leaves: `Timing`.
A graph keeps the host out of the figure (a launch costs tens of microseconds, more than a small kernel runs); what a launch costs the
host is measured apart. Calls run back to back, so the card reaches the clock that it can hold: the figure of a step, not of a lone kernel.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
SECONDS_PER_CASE = 0.12
_GRAPH_MS = 3.0
"""A replay this long makes its own start negligible."""
_MOST_CALLS_PER_GRAPH = 240
_REPLAYS = (5, 40)
_L2_TIMES = 3
"""Buffers of this many L2 caches must pass before a call may meet its own again."""
_MOST_ROTATIONS = 8


@dataclass(frozen=True)
class Timing:
    """ms of one call on the device, what a launch costs the host, width of the middle 80 % of the replays as a share of their median."""

    ms: float
    launch_us: float
    spread: float
    graph: bool


def rotations(bytes_moved: int, device: torch.device) -> int:
    """How many sets of buffers keep calls that move so many bytes out of the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_ROTATIONS, max(2, 1 + math.ceil(_L2_TIMES * cache / max(1, bytes_moved))))


def time_calls(calls: Sequence[Call], seconds: float = SECONDS_PER_CASE) -> Timing:
    """Time calls that take turns. Raises what a call raises; a call that a graph cannot hold is timed without one."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    launch_us = _host_us(calls)
    round_ms = _milliseconds([_round(calls)])[0]
    rounds = max(1, min(_MOST_CALLS_PER_GRAPH // len(calls), math.ceil(_GRAPH_MS / max(round_ms, 1e-3))))
    replay = _captured(calls, rounds)
    graph = replay is not None
    work: Call = replay if replay is not None else _round(list(calls) * rounds)
    work()
    once = _milliseconds([work])[0]
    taken = _milliseconds([work] * max(_REPLAYS[0], min(_REPLAYS[1], int(seconds * 1e3 / max(once, 1e-3)))))
    ms = statistics.median(taken)
    low, high = (sorted(taken)[round((len(taken) - 1) * share)] for share in (0.1, 0.9))
    return Timing(ms / (rounds * len(calls)), launch_us, (high - low) / ms, graph)


def _round(calls: Sequence[Call]) -> Call:
    def work() -> None:
        for call in calls:
            call()

    return work


def _captured(calls: Sequence[Call], rounds: int) -> Call | None:
    """Replay of a graph of all calls, `rounds` times; None if they cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            _round(list(calls) * rounds)()
    except RuntimeError:
        torch.cuda.synchronize()  # raises again if the device itself is lost
        return None
    return graph.replay


def _host_us(calls: Sequence[Call]) -> float:
    """Microseconds of the host per call, the device left to work behind."""
    start = time.perf_counter()
    for call in calls:
        call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / len(calls) * 1e6


def _milliseconds(works: Sequence[Call]) -> list[float]:
    """Device time of each work, queued one behind the other."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
    marks[0].record()
    for work, mark in zip(works, marks[1:], strict=True):
        work()
        mark.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(second) for first, second in zip(marks, marks[1:], strict=False)]
