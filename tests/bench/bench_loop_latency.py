"""How late is an event loop beside a training thread? Prints p50, p99 and maximum with and without training.

    python tests/bench/bench_loop_latency.py [--seconds 10] [--processes 3] [--set niceness=0 switch_interval_s=0.005 threads=2]

Each process runs an event loop (uvloop where present) that sleeps 5 ms again and again and notes how much later it woke, and beside it
the training thread of a peer on the demo's model. `--processes 3` on a laptop is the demo's load. The goal is a p99 below 50 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tscale_fed.trainer import Trainer

INTERVAL_S = 0.005
SETTLE_STEPS = 5
"""The first steps import, allocate and page in, once per process; they are not what a peer lives with."""
CONFIG = Path(__file__).parents[2] / "configs" / "demo-cpu.toml"


async def wake_delays_s(seconds: float) -> list[float]:
    """How much later than asked the loop woke, again and again for `seconds`."""
    delays, end = [], time.monotonic() + seconds
    while (asked := time.monotonic()) < end:
        await asyncio.sleep(INTERVAL_S)
        delays.append(time.monotonic() - asked - INTERVAL_S)
    return delays


async def measure(folder: Path, seconds: float, training: bool, changes: dict[str, Any]) -> tuple[list[float], float]:
    """(delays, tokens per second) of one process."""
    from tscale_fed.assembly import build_trainer, model_shape, prepare_data, start_weights
    from tscale_fed.config import load_config
    from tscale_fed.device import choose_device
    from tscale_fed.training_thread import Priority, TrainingThread
    from tscale_net.ports import SystemClock

    if not training:
        return await wake_delays_s(seconds), 0.0
    config, clock = load_config(CONFIG), SystemClock()
    data, recipe = prepare_data(config.data, folder), config.recipe()
    weights = start_weights(recipe, model_shape(recipe, data.vocab))
    trainer = build_trainer(recipe, data, choose_device("cpu"), weights, peer_id="bench", budget_batches=1000, clock=clock)
    loop, settled = asyncio.get_running_loop(), asyncio.Event()

    def meeting(trainer: Trainer) -> None:
        if trainer.steps == SETTLE_STEPS:
            loop.call_soon_threadsafe(settled.set)

    thread = TrainingThread(trainer, clock, replace(Priority(threads=1), **changes), meeting)
    thread.start()
    await settled.wait()
    before, started = thread.report.tokens, time.monotonic()
    delays = await wake_delays_s(seconds)
    rate = (thread.report.tokens - before) / (time.monotonic() - started)
    await thread.stop()
    return delays, rate


def one_process(results: Queue[tuple[list[float], float]], *arguments: Any) -> None:
    """Entry of a process: measure, and hand the figures over."""
    try:
        from uvloop import run
    except ModuleNotFoundError:
        from asyncio import run
    results.put(run(measure(*arguments)))


def report(title: str, processes: int, folder: Path, seconds: float, training: bool, changes: dict[str, Any]) -> None:
    """Run the processes side by side and print one line."""
    context = multiprocessing.get_context("spawn")
    results: Queue[tuple[list[float], float]] = context.Queue()
    running = [context.Process(target=one_process, args=(results, folder, seconds, training, changes)) for _ in range(processes)]
    for process in running:
        process.start()
    measured = [results.get() for _ in running]
    for process in running:
        process.join()
    delays_ms = sorted(1000 * delay for delays, _ in measured for delay in delays)
    quantile = {q: delays_ms[min(len(delays_ms) - 1, int(q * len(delays_ms)))] for q in (0.5, 0.99, 0.999)}
    figures = "   ".join(f"p{100 * q:g} {value:6.2f} ms" for q, value in quantile.items())
    tokens_per_s = sum(rate for _, rate in measured)
    print(f"{title:<34} {figures}   max {delays_ms[-1]:6.2f} ms   {tokens_per_s:8.0f} tokens/s in sum", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change fields of training_thread.Priority")
    args = parser.parse_args()
    changes = {name: (float if "." in value else int)(value) for name, value in (item.split("=") for item in args.set)}
    with tempfile.TemporaryDirectory() as folder:
        from tscale_fed.assembly import prepare_data
        from tscale_fed.config import load_config

        prepare_data(load_config(CONFIG).data, Path(folder))
        report("event loop alone", args.processes, Path(folder), args.seconds, False, changes)
        title = f"beside training, {args.processes} process(es)" + (f", {' '.join(args.set)}" if args.set else "")
        report(title, args.processes, Path(folder), args.seconds, True, changes)


if __name__ == "__main__":
    sys.exit(main())
