"""`tscale-peer`: run one peer from its command line to its goodbye.

Ctrl+C (or SIGTERM) once: publish, hand over, save, leave. Twice: stop now; the last checkpoint and the log are intact.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections.abc import Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tscale_fed.config import RunConfig
    from tscale_fed.console import Console
    from tscale_fed.ground import Ground
    from tscale_fed.home import Home

T = TypeVar("T")

EXIT_STOPPED_TWICE = 130


def run(arguments: argparse.Namespace) -> int:
    """Raises Refused with one sentence for everything that users can mend."""
    from tscale_fed.config import load_config
    from tscale_fed.console import standard_console
    from tscale_fed.early_checks import check_early
    from tscale_fed.event_loop import run_on_fast_loop
    from tscale_fed.home import Home, HomeLock
    from tscale_net.ports import SystemClock

    config = load_config(arguments.config) if arguments.config is not None else None
    console = standard_console(SystemClock(), json_log=arguments.json_log)
    try:
        with HomeLock(Home(arguments.home)) as home, ThreadPoolExecutor(1, "checks") as executor:
            check_early(arguments, home)
            return run_on_fast_loop(_run(arguments, config, home, console, executor))
    finally:
        console.close()


async def _run(arguments: argparse.Namespace, config: RunConfig | None, home: Home, console: Console, executor: Executor) -> int:
    from tscale_fed.control import ControlServer
    from tscale_fed.device import choose_device
    from tscale_fed.find_run import find_run
    from tscale_fed.ground import open_ground, reach_sentence
    from tscale_fed.peer_session import PeerSession
    from tscale_fed.peer_status import status_of
    from tscale_fed.session_parts import build

    stop = asyncio.Event()
    _on_signals(stop, console)
    settings = config.device if config is not None else None
    device = choose_device(arguments.device, settings)  # before anything is written or fetched
    ground = await open_ground(arguments, home, console, executor)
    try:
        console.say(f"reach: {reach_sentence(ground.addresses, arguments.solo)}")
        found = await _unless(stop, find_run(ground, config))
        if found is None:
            return 0
        built = await asyncio.to_thread(build, ground, found, device)
        session = PeerSession(ground, found, built, stop)
        control = ControlServer(home.path, lambda: status_of(session), session.commands())
        await control.start()
        try:
            if arguments.role == "seed":
                _print_join_line(ground, console)
            if arguments.seconds is not None:
                asyncio.get_running_loop().call_later(arguments.seconds, stop.set)
            await session.run()
        finally:
            await control.close()
        return 0
    finally:
        await ground.outside.transport.close()


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if `stop` comes first."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, stopped):
            each.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


def _on_signals(stop: asyncio.Event, console: Console) -> None:
    loop = asyncio.get_running_loop()

    def asked() -> None:
        if stop.is_set():
            console.close()
            os._exit(EXIT_STOPPED_TWICE)
        console.say("leaving: publishing what the swarm does not have yet (Ctrl+C again stops at once)")
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked)


def _print_join_line(ground: Ground, console: Console) -> None:
    """What others type. The first address is the one that this machine believes to be reachable."""
    from tscale_net.address import parse

    shown = [parse(text) for text in ground.addresses]
    if shown:
        first = shown[0]
        console.say(f"others join with:  tscale-peer --bootstrap {ground.identity.peer_id}@{first.host}:{first.port}")
