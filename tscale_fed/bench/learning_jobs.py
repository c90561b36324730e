"""Many runs at once: jobs, worker processes, progress lines.

Enters: a plan, rows, rates, seeds. Leaves: one `Measured` per job, in the order of the jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch

from tscale_fed.bench.learning_rows import ONE, SYNC, Measured, Plan, measure
from tscale_fed.console import Console
from tscale_fed.units import duration_text
from tscale_net.errors import Refused
from tscale_net.ports import Clock

PROGRESS_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one row."""

    plan: Plan
    data_folder: Path
    row: str
    rate: float
    seed: int

    @property
    def step_cost(self) -> int:
        """Batches per step: the unit of the progress line."""
        return 1 if self.row == ONE else self.plan.peers

    @property
    def cost(self) -> int:
        return self.plan.steps * self.step_cost


def jobs_of(plan: Plan, data_folder: Path, swarm_rows: Iterable[str], rates: Iterable[float], seeds: Iterable[int]) -> list[Job]:
    """Rows "one", "sync" and `swarm_rows`, at every rate, with every seed.

    Seed by seed, so that a bench that was cut short still compares like with like; the short runs last, so that no worker idles at the end.
    """
    rows = [*dict.fromkeys(swarm_rows), SYNC, ONE]
    rates, seeds = list(dict.fromkeys(rates)), list(seeds)
    return [Job(plan, data_folder, row, rate, seed) for seed in seeds for row in rows for rate in rates]


def run_jobs(jobs: Sequence[Job], workers: int, console: Console, clock: Clock, keep: Callable[[list[Measured]], None]) -> list[Measured]:
    """Run all jobs in `workers` processes; a line per finished job, and one every 10 s. `keep` gets all that is finished each time more is.

    Raises what a job raises, after cancelling the others; Refused("bench-worker") if a process died.
    """
    # Spawned, not forked: a forked child can use neither CUDA nor a torch that already has threads.
    context = get_context("spawn")
    done_batches = context.Value("q", 0)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(done_batches,)) as pool:
        futures = {pool.submit(_work, job): job for job in jobs}
        try:
            _watch(futures, done_batches, console, clock, keep)
            return [future.result() for future in futures]
        except BrokenProcessPool:
            detail = "a worker process died, most likely for want of memory: use fewer --workers or a smaller --dims"
            raise Refused("bench-worker", detail) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _watch(
    futures: dict[Future[Measured], Job],
    done_batches: Synchronized[int],
    console: Console,
    clock: Clock,
    keep: Callable[[list[Measured]], None],
) -> None:
    """Until all are done or one fails."""
    all_batches = sum(job.cost for job in futures.values())
    started, waiting = clock.now(), set(futures)
    while waiting:
        finished, waiting = wait(waiting, timeout=PROGRESS_INTERVAL_S, return_when=FIRST_COMPLETED)
        fraction = done_batches.value / all_batches
        left = f", {duration_text((clock.now() - started) * (1 - fraction) / fraction)} left" if fraction else ""
        for future in finished:
            console.say(f"{_line(future.result())}  {fraction:.0%} done{left}")
        if finished:
            keep([future.result() for future in futures if future not in waiting])
        else:
            console.say(f"{fraction:.0%} done{left}")


def _line(run: Measured) -> str:
    loss = f"loss {run.last_loss:.4f}" if run.last_loss is not None else f"diverged: {run.failure}"
    return f"{run.row}, rate {run.rate:g}, seed {run.seed}: {loss} in {duration_text(run.seconds)}"


# -- in a worker -------------------------------------------------------------------------------------------------------

_done_batches: Synchronized[int] | None = None


def _start_worker(done_batches: Synchronized[int]) -> None:
    global _done_batches
    _done_batches = done_batches
    torch.set_num_threads(1)


def _work(job: Job) -> Measured:
    reported = 0

    def progress(step: int) -> None:
        nonlocal reported
        _count((step - reported) * job.step_cost)
        reported = step

    run = measure(job.plan, job.data_folder, job.row, job.rate, job.seed, progress)
    progress(job.plan.steps)  # a run that diverged stops early; its rest counts as done
    return run


def _count(batches: int) -> None:
    if _done_batches is not None:
        with _done_batches.get_lock():
            _done_batches.value += batches
