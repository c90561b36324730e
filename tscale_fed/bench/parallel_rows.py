"""One process of `bench parallel`: `python -m tscale_fed.bench.parallel_rows FOLDER`, with the environment of a rank.

Enters: FOLDER/job.json. Leaves (rank 0): FOLDER/rows.json after every row, FOLDER/machine.json. A row trains for some steps from one start
and notes every step's time and loss; in row `one` rank 0 is alone and the others wait.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tscale_fed.assembly import build_evaluator, build_trainer, model_shape, prepare_data, start_weights
from tscale_fed.bench.machine import write_result
from tscale_fed.config import BatchSection, DataSection, DeviceSection, EvalSection, ModelSection, OptimizerSection, Recipe
from tscale_fed.data.token_data import TokenData
from tscale_fed.device import choose_device
from tscale_fed.parallel.agreement import check_replicas
from tscale_fed.parallel.exchange import Exchanging
from tscale_fed.parallel.group import Group
from tscale_fed.parallel.world import World, world_from
from tscale_fed.trainer import Trainer
from tscale_net.errors import Refused
from tscale_net.ports import SystemClock

WARM_UP_STEPS = 5
"""Not timed: compiling, graphs, first allocations."""
EXCHANGES = 5
"""Of a whole gradient without a backward pass, timed after the steps."""
DRAWN_ON_DEVICE = 400_000_000
"""Models with more weights start from numbers drawn on the GPU: on the processor it would take half a minute per row."""
SEED = 1


@dataclass(frozen=True)
class Job:
    """What all rows have in common; sizes are per GPU and step."""

    dims: str
    fragments: int
    accumulate: int
    tokens: int
    tokenizer: str
    source: str
    steps: int
    evaluate_every: int
    rate: float
    warm_up: int
    precision: str
    attention: str
    micro_batch: int
    device: str
    folder: str
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def recipe(self) -> Recipe:
        return Recipe(
            seed=SEED,
            model=ModelSection(dims=self.dims),
            batch=BatchSection(fragments=self.fragments, length=self.tokens, accumulate=self.accumulate),
            optimizer=OptimizerSection(rate=self.rate, warmup_batches=self.warm_up),
        )

    def data(self) -> TokenData:
        return prepare_data(DataSection(sources=(self.source,), tokenizer=self.tokenizer), Path(self.folder) / "data")

    @property
    def evaluation(self) -> EvalSection:
        return EvalSection(fragments=self.fragments, batches=8)


class Rows:
    """The rows of one process."""

    def __init__(self, job: Job, world: World, group: Group, data: TokenData) -> None:
        self._job = job
        self._world = world
        self._group = group
        self._data = data
        settings = DeviceSection(precision=job.precision, attention=job.attention, micro_batch=job.micro_batch)  # type: ignore[arg-type]
        self._device = choose_device(str(group.device), settings)
        self._notes: list[str] = []

    def measure(self, name: str) -> dict[str, Any]:
        """One row's figures; what cannot run is a row with its reason."""
        alone = name == "one"
        exchanging = None if alone else Exchanging(name, self._group)  # type: ignore[arg-type]
        self._notes = []
        with _memory_given_back(self._group.device):
            started = time.perf_counter()
            try:
                trainer = self._trainer(exchanging)
                return {"row": name, "ranks": 1 if alone else self._world.size, **self._run(trainer, exchanging, started)}
            except (Refused, torch.OutOfMemoryError) as error:
                if getattr(error, "code", "") == "rank-lost":
                    raise
                return {"row": name, "ranks": 1 if alone else self._world.size, "failure": str(error).splitlines()[0]}

    def _trainer(self, exchanging: Exchanging | None) -> Trainer:
        recipe, key = self._job.recipe(), self._world.data_key("bench")
        trainer = build_trainer(
            recipe, self._data, self._device, self._start(recipe), peer_id=key, budget_batches=self._job.steps, clock=SystemClock(),
            say=self._notes.append, exchanging=exchanging,
        )  # fmt: skip
        if exchanging is not None:
            self._group.copy_leader(trainer.weights)
        return trainer

    def _start(self, recipe: Recipe) -> torch.Tensor:
        shape = model_shape(recipe, self._data.vocab)
        if self._group.device.type == "cpu" or shape.trained_parameters < DRAWN_ON_DEVICE:
            return start_weights(recipe, shape)
        from tscale_fed.bench.compiled_baseline import random_start

        return random_start(shape, self._group.device, SEED)

    def _run(self, trainer: Trainer, exchanging: Exchanging | None, started: float) -> dict[str, Any]:
        job, group = self._job, None if exchanging is None else self._group
        evaluator = build_evaluator(trainer.recipe, self._data, job.evaluation, self._device, SystemClock(), group)
        seconds: list[float] = []
        train: list[tuple[int, float]] = []
        held_out: list[tuple[int, float]] = []
        start_s = 0.0
        for step in range(1, job.steps + 1):
            report = trainer.step()
            train.append((trainer.tokens, report.loss))
            if step == min(WARM_UP_STEPS, job.steps):
                start_s = time.perf_counter() - started
            if step > WARM_UP_STEPS:
                seconds.append(report.seconds)
            if step == job.steps or (job.evaluate_every and step % job.evaluate_every == 0):
                held_out.append((trainer.tokens, evaluator.loss(trainer.weights).loss))
        found = self._figures(trainer, seconds, start_s)
        if exchanging is not None:
            check_replicas(self._group, trainer.steps, (trainer.weights, trainer.optimizer.momentum, trainer.optimizer.moment_sums))
            found["replicas"] = "bit-identical"
            found["bytes_per_step_and_rank"] = exchanging.exchange.bytes_per_step
            found["bytes_per_weight"] = exchanging.exchange.bytes_per_step / trainer.weights.numel()
            found["exchange_alone_ms"] = self._time_exchange(exchanging)
        return {**found, "train_loss": train, "held_out_loss": held_out}

    def _figures(self, trainer: Trainer, seconds: list[float], start_s: float) -> dict[str, Any]:
        step_tokens = trainer.tokens / trainer.steps
        median = statistics.median(seconds) if seconds else float("nan")
        device = self._group.device
        return {
            "weights": trainer.weights.numel(),
            "start_s": round(start_s, 1),
            "ms_per_step": median * 1e3 if seconds else None,
            "ms_slowest": max(seconds) * 1e3 if seconds else None,
            "tokens_per_step": step_tokens,
            "tokens_per_s": step_tokens / median if seconds else None,
            "gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
            "plan": self._notes[-1] if self._notes else self._device.precision.name,
        }

    def _time_exchange(self, exchanging: Exchanging) -> float:
        """Of a whole gradient, nothing beside it; afterwards the gradient is of no use."""
        exchange, device = exchanging.exchange, self._group.device
        times = []
        for _ in range(EXCHANGES):
            self._group.meet()
            began = time.perf_counter()
            for index in range(len(exchange.buckets)):
                exchange.ready(index)
            exchange.finish()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times)


@contextmanager
def _memory_given_back(device: torch.device) -> Iterator[None]:
    def give_back() -> None:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    give_back()
    yield
    give_back()


def _card(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"gpu": None}
    version = torch.cuda.nccl.version()
    return {"gpu": torch.cuda.get_device_name(device), "gpus_shown": torch.cuda.device_count(), "nccl": ".".join(map(str, version))}


def main(folder: Path) -> int:
    """All rows of the job. Returns an exit code."""
    values = json.loads((folder / "job.json").read_text())
    names = values.pop("rows")
    job = Job(**values)
    world = world_from(os.environ)
    assert world is not None, "started by `tscale bench parallel`"
    device = torch.device("cpu") if job.device == "cpu" else torch.device("cuda", world.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    started = time.monotonic()
    group = Group.open(world, device)
    if world.leader:
        job.data()
        group.tell("data", "ready")
        write_result(folder / "machine.json", _card(device))
    group.hear("data")
    rows, found = Rows(job, world, group, job.data()), []
    for name in names:
        late = float(group.copy_leader(torch.tensor([time.monotonic() - started], dtype=torch.float64)))
        if late > job.seconds:
            row: dict[str, Any] = {"row": name, "ranks": world.size, "failure": f"not begun after {job.seconds:.0f} s"}
        elif name == "one" and not world.leader:
            group.hear(f"row/{name}")
            continue
        else:
            row = rows.measure(name)
        if world.leader:
            found.append(row)
            write_result(folder / "rows.json", found)  # type: ignore[arg-type]
            print(_line(row), flush=True)
            group.tell(f"row/{name}", "done")
    group.close()
    return 0


def _line(row: dict[str, Any]) -> str:
    if "failure" in row:
        return f"{row['row']}: {row['failure']}"
    speed = f"{row['tokens_per_s']:,.0f} tokens/s, {row['ms_per_step']:.1f} ms per step" if row["tokens_per_s"] else "too few steps to time"
    return f"{row['row']}: {speed}, started in {row['start_s']} s, held-out loss {row['held_out_loss'][-1][1]:.4f}; {row['plan']}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
