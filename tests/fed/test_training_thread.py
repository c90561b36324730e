"""The training thread beside an event loop: what the loop asks for happens between two steps, and every fault arrives there."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from training_run import make_data, make_trainer

from tscale_fed.trainer import Trainer
from tscale_fed.training_thread import Priority, TrainingFailed, TrainingReport, TrainingThread, default_threads
from tscale_net.errors import Refused
from tscale_net.ports import SystemClock
from tscale_peers.meeting_time import Seconds

PRIORITY = Priority(threads=1, niceness=0)


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Trainer]:
    data = make_data(tmp_path_factory.mktemp("text"))
    return lambda: make_trainer(data)


def thread_of(trainer: Trainer, meeting: Callable[[Trainer], None] = lambda trainer: None, **options: object) -> TrainingThread:
    return TrainingThread(trainer, SystemClock(), PRIORITY, meeting, **options)  # type: ignore[arg-type]


class Signal:
    """An asyncio.Event that another thread may set."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def set(self) -> None:
        self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()


async def test_it_steps_and_meets_after_each_step(trainer_of: Callable[[], Trainer]) -> None:
    met: list[int] = []
    seen = Signal()

    def meeting(trainer: Trainer) -> None:
        assert threading.current_thread().name == "training"
        met.append(trainer.steps)
        if trainer.steps == 5:
            seen.set()

    thread = thread_of(trainer_of(), meeting)
    thread.start()
    await seen.wait()
    await thread.stop()
    assert met[:5] == [1, 2, 3, 4, 5]
    assert thread.report.steps == len(met)
    assert not thread.report.running


async def test_the_same_steps_as_without_a_thread(trainer_of: Callable[[], Trainer]) -> None:
    alone, beside = trainer_of(), trainer_of()
    losses: list[float] = []
    done = Signal()
    thread = thread_of(beside, lambda trainer: done.set() if trainer.steps == 4 else None, until_step=4)
    thread.start()
    await done.wait()
    assert await thread.call(lambda trainer: trainer.steps) == 4
    await thread.stop()
    losses = [alone.step().loss for _ in range(4)]
    assert beside.steps == 4 and thread.report.loss == losses[-1]
    assert bool((alone.weights == beside.weights).all())


async def test_it_stands_still_while_paused_and_calls_still_run(trainer_of: Callable[[], Trainer]) -> None:
    thread = thread_of(trainer_of(), paused=True)
    thread.start()
    assert [await thread.call(lambda trainer: trainer.steps) for _ in range(3)] == [0, 0, 0]
    assert thread.report.paused
    stepped = Signal()
    await thread.call(lambda trainer: None)
    thread.resume()
    await thread.call(lambda trainer: stepped.set())
    await stepped.wait()
    thread.pause()
    steps = await thread.call(lambda trainer: trainer.steps)
    assert await thread.call(lambda trainer: trainer.steps) == steps
    await thread.stop()


async def test_stop_waits_for_the_running_step_only(trainer_of: Callable[[], Trainer]) -> None:
    entered, release = Signal(), threading.Event()

    def meeting(trainer: Trainer) -> None:
        entered.set()
        release.wait()

    thread = thread_of(trainer_of(), meeting)
    thread.start()
    await entered.wait()
    stopping = asyncio.create_task(thread.stop())
    waiting = asyncio.create_task(thread.finished())
    done, _ = await asyncio.wait([stopping], timeout=0.01)
    assert not done
    release.set()
    await stopping
    await waiting
    assert thread.report.steps == 1
    await thread.stop()  # again


async def test_a_call_returns_its_value_and_raises_its_error(trainer_of: Callable[[], Trainer]) -> None:
    thread = thread_of(trainer_of())
    thread.start()

    def fail(trainer: Trainer) -> None:
        raise ValueError("mine")

    assert await thread.call(lambda trainer: trainer.peer_id) == "alice"
    with pytest.raises(ValueError, match="mine"):
        await thread.call(fail)
    assert await thread.call(lambda trainer: 3) == 3
    await thread.stop()
    await thread.finished()


async def test_calls_after_the_end_are_told_so(trainer_of: Callable[[], Trainer]) -> None:
    thread = thread_of(trainer_of())
    thread.start()
    await thread.stop()
    with pytest.raises(TrainingFailed, match="ended"):
        await thread.call(lambda trainer: 1)


async def test_a_call_that_waits_when_training_fails_is_told_so(trainer_of: Callable[[], Trainer]) -> None:
    entered, release = Signal(), threading.Event()

    def meeting(trainer: Trainer) -> None:
        entered.set()
        release.wait()
        raise OSError("disk")

    thread = thread_of(trainer_of(), meeting)
    thread.start()
    await entered.wait()
    waiting = asyncio.create_task(thread.call(lambda trainer: 1))
    await asyncio.sleep(0)
    release.set()
    with pytest.raises(TrainingFailed, match="ended before"):
        await waiting


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (Refused("disk-full", "the disk is full"), Refused, "the disk is full"),
        (RuntimeError("two\nlines"), TrainingFailed, "RuntimeError: two lines"),
        (AssertionError(), TrainingFailed, "AssertionError: no further words"),
    ],
)
async def test_a_fault_reaches_the_loop_as_one_sentence(
    trainer_of: Callable[[], Trainer], error: Exception, kind: type[Exception], words: str
) -> None:
    def meeting(trainer: Trainer) -> None:
        raise error

    thread = thread_of(trainer_of(), meeting)
    thread.start()
    with pytest.raises(kind) as caught:
        await thread.finished()
    assert words in str(caught.value) and "\n" not in str(caught.value)
    await thread.stop()
    assert not thread.report.running


async def test_a_cancelled_wait_leaves_training_alone(trainer_of: Callable[[], Trainer]) -> None:
    thread = thread_of(trainer_of())
    thread.start()
    waiting = asyncio.create_task(thread.finished())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    before = await thread.call(lambda trainer: trainer.steps)
    while await thread.call(lambda trainer: trainer.steps) == before:
        pass
    await thread.stop()


async def test_a_cancelled_call_is_not_run(trainer_of: Callable[[], Trainer]) -> None:
    entered, release, ran = Signal(), threading.Event(), []

    def block(trainer: Trainer) -> None:
        entered.set()
        release.wait()

    thread = thread_of(trainer_of(), paused=True)
    thread.start()
    blocking = asyncio.create_task(thread.call(block))
    await entered.wait()
    unwanted = asyncio.create_task(thread.call(lambda trainer: ran.append(1)))
    await asyncio.sleep(0)
    unwanted.cancel()
    await asyncio.sleep(0)
    release.set()
    await blocking
    await thread.call(lambda trainer: None)
    await thread.stop()
    assert ran == []


async def test_the_report_says_how_busy_it_is(trainer_of: Callable[[], Trainer]) -> None:
    done = Signal()
    thread = thread_of(trainer_of(), lambda trainer: done.set() if trainer.steps == 6 else None, until_step=6)
    thread.start()
    await done.wait()
    reports = []
    while not (reports and reports[-1].steps == 6):
        reports.append(await thread.call(lambda trainer: thread.report))
    assert all(0.0 <= report.busy_fraction <= 1.0 for report in reports)
    assert reports[-1].tokens == 6 * 30
    await thread.stop()


async def test_the_report_says_how_long_meetings_take_and_for_what(trainer_of: Callable[[], Trainer]) -> None:
    """A clock that moves by a second whenever it is read: a step reads it twice, a meeting's two ends too."""

    class Counting:
        time = 0.0

        def now(self) -> float:
            self.time += 1.0
            return self.time

    clock, trainer, done = Counting(), trainer_of(), Signal()
    trainer._clock = clock  # type: ignore[assignment]

    def meeting(trainer: Trainer) -> Seconds:
        clock.time += 2.0
        if trainer.steps == 5:
            reports.append(thread.report)  # of the four before
            done.set()
        return Seconds(receive=1.0, publish=0.5, wait=0.25)

    reports: list[TrainingReport] = []
    thread = TrainingThread(trainer, clock, PRIORITY, meeting)  # type: ignore[arg-type]
    thread.start()
    await done.wait()
    await thread.stop()
    (report,) = reports
    assert report.busy_fraction == pytest.approx(1 / 6, rel=0.2) and report.exchange_fraction == pytest.approx(3 / 6, rel=0.2)
    causes = report.exchange_causes
    assert causes.receive == pytest.approx(report.exchange_fraction / 3) and causes.publish == pytest.approx(causes.receive / 2)
    assert causes.hash == 0 and causes.wait == pytest.approx(causes.receive / 4)


def test_default_threads_leave_room_for_the_event_loop() -> None:
    import torch

    cpu = torch.device("cpu")
    assert 1 <= default_threads(cpu, beside_event_loop=True) <= default_threads(cpu, beside_event_loop=False)
    assert default_threads(torch.device("cuda:0"), beside_event_loop=True) == 1


def test_nothing_runs_without_a_loop(trainer_of: Callable[[], Trainer], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        thread_of(trainer_of()).start()


LEAVES_WITHOUT_STOPPING = """
import asyncio, sys
from pathlib import Path
from training_run import make_data, make_trainer
from tscale_fed.training_thread import Priority, TrainingThread
from tscale_net.ports import SystemClock

async def main():
    thread = TrainingThread(make_trainer(make_data(Path(sys.argv[1]))), SystemClock(), Priority(threads=1))
    thread.start()
    while thread.report.steps < 3:
        await asyncio.sleep(0)

asyncio.run(main())
"""


def test_a_program_that_ends_without_stopping_ends_cleanly(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", LEAVES_WITHOUT_STOPPING, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
