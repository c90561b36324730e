"""Training beside an event loop: a thread of its own that owns the weights.

Enters: a `Trainer`, a meeting hook, requests from the event loop (pause, resume, stop, call). Leaves: a `TrainingReport` that any thread
may read at any time, and one sentence if training failed.

The rule: the thread repeats step, meeting, waiting calls. Whatever touches the weights runs on it, between two steps, so nothing needs a
lock and the loop never waits for a step: it awaits. The loop keeps its latency because torch lets go of the interpreter lock inside its
operations, and because the thread asks the system to run after everything else of this process (`Priority`).
"""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from tscale_fed.trainer import StepReport, Trainer
from tscale_net.errors import Refused
from tscale_net.ports import Clock
from tscale_peers.meeting_time import Seconds

T = TypeVar("T")
Meeting = Callable[[Trainer], Seconds | None]
"""Called after each step; may return what it cost, by cause."""

AVERAGE_S = 30.0
"""Time constant of the averages that people see (busy fraction, tokens per second)."""
NICENESS = 5
"""Of the training thread, Linux only (see `Priority.apply`)."""
STOP_AT_EXIT_S = 10.0
"""How long a program that ends without `stop` waits for the running step."""
SWITCH_INTERVAL_S = 0.001
"""How long Python code of the training thread may hold the interpreter while the event loop waits (Python's default is 0.005)."""


class TrainingFailed(Exception):
    """Training ended by an error; the text is one sentence for people."""


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """How training stands. Immutable; replaced as a whole after every step."""

    steps: int = 0
    """Own steps of this home directory."""
    tokens: int = 0
    """Tokens with a target that own steps have seen."""
    loss: float = math.nan
    """Of the last step, nats per token."""
    loss_average: float = math.nan
    """Moving average of it."""
    rate: float = 0.0
    """Step size of the last step."""
    tokens_per_s: float = 0.0
    """Moving average over wall time, pauses and meetings included."""
    busy_fraction: float = 0.0
    """Moving average of time in steps over wall time, 0 to 1."""
    exchange_fraction: float = 0.0
    """Moving average of time in meetings with the swarm over wall time, 0 to 1: the device does not train meanwhile."""
    exchange_causes: Seconds = Seconds()
    """Seconds per second of wall time, by cause; together no more than `exchange_fraction`."""
    paused: bool = False
    running: bool = False


@dataclass(frozen=True, slots=True)
class Priority:
    """What keeps the event loop quick beside training; the one place where that is set."""

    threads: int
    """Processor threads of torch operations."""
    niceness: int = NICENESS
    switch_interval_s: float = SWITCH_INTERVAL_S

    def apply(self) -> None:
        """Call on the training thread. Linux gives each thread its own niceness; elsewhere it would slow the whole process."""
        torch.set_num_threads(self.threads)
        sys.setswitchinterval(self.switch_interval_s)
        if sys.platform == "linux" and self.niceness > 0:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self.niceness)


def default_threads(device: torch.device, beside_event_loop: bool) -> int:
    """Half of the processor's cores where an event loop (and the codec) runs beside training, else all; 1 is enough to feed a GPU."""
    if device.type != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2) if beside_event_loop else cores


@dataclass(slots=True)
class _Call:
    """A function that the event loop wants run between two steps."""

    function: Callable[[Trainer], Any]
    reply: asyncio.Future[Any]


class TrainingThread:
    """Start it once, on the event loop; every other method belongs to the event loop too, except `report`, which any thread may read."""

    def __init__(
        self,
        trainer: Trainer,
        clock: Clock,
        priority: Priority,
        meeting: Meeting = lambda trainer: None,
        until_step: int | None = None,
        paused: bool = False,
    ) -> None:
        """`meeting` is called on the thread after each step. At own step `until_step` training pauses by itself (calls still run)."""
        self.report = TrainingReport(steps=trainer.steps, tokens=trainer.tokens, paused=paused)
        self._trainer = trainer
        self._clock = clock
        self._priority = priority
        self._meeting = meeting
        self._until_step = until_step
        self._paused = paused
        self._stopping = False
        self._calls: deque[_Call] = deque()
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="training", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None
        self._averages = _Averages()

    def start(self) -> None:
        """Begin. Raises RuntimeError outside an event loop or the second time."""
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._thread.start()
        # A thread that is inside a torch operation when the interpreter goes away would take the whole process down with an abort.
        atexit.register(self._stop_at_exit)

    def pause(self) -> None:
        """No further step after the running one; meetings stop too, calls go on."""
        self._set(paused=True)

    def resume(self) -> None:
        self._set(paused=False)

    async def stop(self) -> None:
        """End the thread after the running step and meeting; calls still waiting raise TrainingFailed.

        May be repeated; does not raise for a failed training (`finished` does). Cancelling this leaves the stop request standing.
        """
        self._set(stopping=True)
        if self._ended is not None:
            await asyncio.wait([self._ended])
            self._thread.join()  # its last act was to say that it ends
            atexit.unregister(self._stop_at_exit)

    async def finished(self) -> None:
        """Wait until the thread has ended. Cancelling this leaves the thread running.

        Raises TrainingFailed with one sentence, or the Refused that the step, meeting or thread itself raised.
        """
        assert self._ended is not None, "start() comes first"
        await asyncio.shield(self._ended)

    async def call(self, function: Callable[[Trainer], T]) -> T:
        """Run `function(trainer)` on the thread between two steps (at once if paused) and return its result.

        What it raises is raised here and does not end training. Cancelled before its turn, it is not run.
        Raises TrainingFailed if the thread has ended or ends before its turn.
        """
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[T] = loop.create_future()
        with self._wake:
            if self._stopping or not self._thread.is_alive():
                raise TrainingFailed("training has ended, so nothing can be asked of it any more")
            self._calls.append(_Call(function, reply))
            self._wake.notify()
        return await reply

    # -- on the training thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        failure: Exception | None = None
        try:
            self._priority.apply()
            while self._next():
                self._step()
        except Exception as error:  # the thread's boundary: every fault must reach the loop, none may vanish with the thread
            failure = _sentence(error)
        self._post(self._end, failure)

    def _next(self) -> bool:
        """Serve calls until a step is due (True) or the thread shall end (False)."""
        while True:
            with self._wake:
                while not (self._calls or self._stopping or self._may_step()):
                    self._note_idle()
                    self._wake.wait()
                if self._stopping:
                    return False
                call = self._calls.popleft() if self._calls else None
            if call is None:
                return True
            self._serve(call)

    def _may_step(self) -> bool:
        reached = self._until_step is not None and self._trainer.steps >= self._until_step
        return not self._paused and not reached

    def _step(self) -> None:
        step = self._trainer.step()
        begun = self._clock.now()
        causes = self._meeting(self._trainer) or Seconds()
        now = self._clock.now()
        self._averages.add(now, step, now - begun, causes)
        self.report = TrainingReport(
            steps=self._trainer.steps,
            tokens=self._trainer.tokens,
            loss=step.loss,
            loss_average=self._trainer.loss_average,
            rate=step.rate,
            tokens_per_s=self._averages.tokens_per_s,
            busy_fraction=self._averages.busy_fraction,
            exchange_fraction=self._averages.exchange_fraction,
            exchange_causes=self._averages.exchange_causes,
            paused=self._paused,
            running=True,
        )

    def _note_idle(self) -> None:
        last = self.report
        self.report = TrainingReport(last.steps, last.tokens, last.loss, last.loss_average, last.rate, paused=True, running=True)
        self._averages = _Averages()  # training stands still: what follows is a new measurement

    def _serve(self, call: _Call) -> None:
        if call.reply.cancelled():
            return
        try:
            result, error = call.function(self._trainer), None
        except Exception as raised:  # whatever the caller's function raises belongs to the caller, over there on the loop
            result, error = None, raised
        self._post(_answer, call.reply, result, error)

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return  # the loop is closed: nobody is left to tell

    # -- on the event loop -------------------------------------------------------------------------------------------

    def _set(self, *, paused: bool | None = None, stopping: bool = False) -> None:
        with self._wake:
            self._paused = self._paused if paused is None else paused
            self._stopping = self._stopping or stopping
            self._wake.notify()

    def _stop_at_exit(self) -> None:
        self._set(stopping=True)
        self._thread.join(STOP_AT_EXIT_S)

    def _end(self, failure: Exception | None) -> None:
        assert self._ended is not None
        last = self.report
        self.report = TrainingReport(last.steps, last.tokens, last.loss, last.loss_average, last.rate)
        with self._wake:
            self._stopping = True
            waiting, self._calls = list(self._calls), deque()
        for call in waiting:
            _answer(call.reply, None, TrainingFailed("training ended before this could be done"))
        if self._ended.done():
            return
        if failure is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(failure)
            self._ended.exception()  # seen: a peer that only ever calls stop() shall not get "exception was never retrieved"


class _Averages:
    """Exponential averages over wall time, unbiased from the first step on."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0
        self.busy_fraction = 0.0
        self.exchange_fraction = 0.0
        self.exchange_causes = Seconds()
        self._last: float | None = None
        self._weight = 0.0

    def add(self, now: float, step: StepReport, meeting_s: float, causes: Seconds) -> None:
        wall = step.seconds + meeting_s if self._last is None else max(now - self._last, step.seconds)
        self._last = now
        if wall <= 0:
            return
        self._weight += wall
        part = max(1 - math.exp(-wall / AVERAGE_S), wall / self._weight)
        self.tokens_per_s += part * (step.tokens / wall - self.tokens_per_s)
        self.busy_fraction += part * (min(1.0, step.seconds / wall) - self.busy_fraction)
        self.exchange_fraction += part * (min(1.0, meeting_s / wall) - self.exchange_fraction)
        pairs = zip(self.exchange_causes, causes, strict=True)
        self.exchange_causes = Seconds(*(average + part * (spent / wall - average) for average, spent in pairs))


def _answer(reply: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if reply.done():
        return
    if error is None:
        reply.set_result(result)
    else:
        reply.set_exception(error)


def _sentence(error: Exception) -> Exception:
    """Refusals are sentences already; anything else becomes one, with the fault itself chained for the log."""
    if isinstance(error, Refused):
        return error
    text = " ".join(str(error).split()) or "no further words"
    failed = TrainingFailed(f"training stopped by an error in this program: {type(error).__name__}: {text}")
    failed.__cause__ = error
    return failed
