"""The demo: a seed and two peers, three real `tscale-peer` processes on this machine, learn real text together.

Enters: a run file and a number of seconds. Leaves: plain output, exit code 0 if the loss fell and all models were equal bit for bit.
The order shows what a swarm is: the seed starts a run; a peer joins through the seed; another joins later, through that peer; all train.
At the end all pause, so that the last deltas reach everybody, and leave. No shortcuts: the processes are started as a user would start
them, with homes, keys and ports of their own, and are watched through their control sockets.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

from tscale_fed.console import Console
from tscale_fed.demo_process import DemoProcess
from tscale_fed.demo_report import States, equal_now, figures_line, summary, untrained_loss
from tscale_fed.home import make_private
from tscale_fed.limits import DEMO_LINE_S, DEMO_POLL_S, DEMO_QUIET_S, DEMO_SAFETY_S
from tscale_fed.status import Status
from tscale_net.errors import Refused
from tscale_net.ports import Clock, SystemClock

LABELS = ("seed", "peer-a", "peer-b")


async def demo(config: Path, seconds: float, keep: Path | None = None) -> int:
    """Run the whole demo. Raises Refused if a process dies; however it ends, no process is left behind. SIGTERM cancels it."""
    clock = SystemClock()
    console = Console(sys.stdout, clock)
    main = asyncio.current_task()
    if main is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)
    place = tempfile.TemporaryDirectory(prefix="tscale-demo-") if keep is None else nullcontext(str(keep))
    with place as folder:
        make_private(Path(folder))
        async with _processes(Path(folder), clock, console) as processes:
            return await _Demo(processes, clock, console).run(config, seconds)


@asynccontextmanager
async def _processes(folder: Path, clock: Clock, console: Console) -> AsyncIterator[list[DemoProcess]]:
    """The processes, not yet started. Afterwards all leave; if that is interrupted too, they are killed."""
    processes = [DemoProcess(label, folder, clock) for label in LABELS]
    try:
        yield processes
        console.say("all three leave")
    except asyncio.CancelledError:
        console.say("stopped: the processes leave (Ctrl+C again kills them)")
        raise
    finally:
        try:
            codes = await asyncio.gather(*(process.leave() for process in processes))
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            console.warn(f"exit codes {', '.join(f'{process.label} {code}' for process, code in zip(processes, codes, strict=True))}")


class _Demo:
    """The course of events."""

    def __init__(self, processes: list[DemoProcess], clock: Clock, console: Console) -> None:
        self._processes = processes
        self._clock = clock
        self._console = console
        self._states = States()
        self._statuses: dict[str, Status] = {}

    async def run(self, config: Path, seconds: float) -> int:
        self._console.say("a seed and two peers: three processes that know each other only through encrypted sockets")
        await self._start_all(config, seconds)
        await self._watch(seconds)
        await self._quiesce()
        before = untrained_loss(self._statuses[LABELS[0]])
        self._console.say("summary")
        for line in summary(before, self._statuses, self._states):
            self._console.detail(line)
        after = self._statuses[LABELS[0]].swarm_loss
        fell = before is not None and after is not None and after < before
        if not fell:
            self._console.warn("the held-out loss did not fall: give it more time with --seconds")
        return 0 if fell and not self._states.differing else 1

    async def _start_all(self, config: Path, seconds: float) -> None:
        seed, first, second = self._processes
        safety = ("--threads", "1", "--seconds", str(seconds + DEMO_SAFETY_S))
        status = await seed.start("--role", "seed", "--config", str(config), *safety)
        self._tell("the seed starts the run", seed, status)
        status = await first.start("--bootstrap", _address(status), *safety)
        self._tell("a peer joined through the seed", first, status)
        status = await second.start("--bootstrap", _address(status), *safety)
        self._tell("another joined, through the first peer", second, status)

    def _tell(self, what: str, process: DemoProcess, status: Status) -> None:
        self._statuses[process.label] = status
        self._console.say(f"{what}: {status.name}   (to look at it: tscale-status --home {process.home})")

    async def _watch(self, seconds: float) -> None:
        begun = self._clock.now()
        next_line_s = begun
        while (now := self._clock.now()) - begun < seconds:
            await self._look()
            if now >= next_line_s:
                next_line_s = now + DEMO_LINE_S
                self._console.say(figures_line(self._statuses, self._states))
            await self._clock.sleep(DEMO_POLL_S)

    async def _look(self) -> None:
        """A snapshot of each process. Raises Refused if one has died."""
        for process in self._processes:
            status = await process.snapshot()
            if status is not None:
                self._statuses[process.label] = status
                self._states.add(process.label, status)

    async def _quiesce(self) -> None:
        """Nobody trains, until all hold the same deltas (or for a while)."""
        self._console.say("all pause, so that the last deltas reach everybody")
        for process in self._processes:
            await process.pause()
        begun = self._clock.now()
        while self._clock.now() - begun < DEMO_QUIET_S:
            await self._clock.sleep(DEMO_POLL_S)
            await self._look()
            if equal_now(self._statuses):
                return


def _address(status: Status) -> str:
    if not status.addresses:
        raise Refused("demo-died", f"{status.name} listens nowhere, so that nobody can join it")
    return status.addresses[0]
