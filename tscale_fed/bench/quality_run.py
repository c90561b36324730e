"""One training run of the quality bench.

Enters: a setting, a place, the text. Leaves: losses at the points where the original was measured, of the last weights and of averages of
them; the same over the whole held-out part at the end.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tscale_fed.bench.quality_learners import Learner, Place, make_learner
from tscale_fed.bench.quality_settings import Setting
from tscale_fed.bench.quality_text import Batch, QualityText
from tscale_fed.optimizer.schedule import rate
from tscale_net.errors import Refused

EVALUATION_BATCHES = 10
POINTS = (100, 200, 300, 500, 800, 1000, 1500, 2000, 2500, 2800)
"""Steps after which losses are taken, and after the last one."""


@dataclass
class Point:
    """Mean losses in nats per byte."""

    step: int
    tokens: int
    train: float
    test: float
    averages: dict[str, float] = field(default_factory=dict)
    """Test loss of averaged weights, by name."""


@dataclass
class Trained:
    """One run."""

    name: str
    arithmetic: str
    schedule: str
    points: list[Point] = field(default_factory=list)
    whole_test: dict[str, float] = field(default_factory=dict)
    """Of the last weights ("last") and of averages, over all of the held-out part."""
    batch_deviation: float = 0.0
    """Standard deviation of the loss of one batch of fragments of the held-out part."""
    step_ms: float = 0.0
    seconds: float = 0.0
    failure: str = ""

    @property
    def evaluation_error(self) -> float:
        """Standard error of a test loss, as its ten batches are a sample of the held-out part."""
        return self.batch_deviation / math.sqrt(EVALUATION_BATCHES)


class Averages:
    """Running averages of the weights: exponential ones, and an even one over the last `mean` steps before a point."""

    def __init__(self, setting: Setting, weights: Tensor) -> None:
        self._weights = weights
        self._ema = {f"ema={decay:g}": (decay, weights.clone()) for decay in setting.ema}
        self._last = setting.mean
        self._sum, self._count = (torch.zeros_like(weights) if setting.mean else weights), 0
        self._steps = 0

    def add(self, steps_to_point: int) -> None:
        """After a step. An exponential average is young at first: it begins as an even one."""
        self._steps += 1
        for decay, average in self._ema.values():
            average.lerp_(self._weights, 1.0 - min(decay, self._steps / (self._steps + 9.0)))
        if self._last and steps_to_point < self._last:
            self._sum.add_(self._weights)
            self._count += 1

    def take(self) -> dict[str, Tensor]:
        """At a point. The even average starts anew."""
        found = {name: average for name, (_, average) in self._ema.items()}
        if self._count:
            found[f"mean={self._last}"] = self._sum / self._count
            self._sum.zero_()
            self._count = 0
        return found


def train(setting: Setting, place: Place, text: QualityText, seconds: float, say: Callable[[str], None]) -> Trained:
    """Run to the end, or as far as `seconds` reach. A run that cannot be built or that diverges is a result."""
    run = Trained(setting.name, setting.arithmetic, setting.schedule)
    started = time.perf_counter()
    try:
        learner = make_learner(setting, place, text.bias2())
        _loop(run, learner, setting, place, text.to(learner.batch_device), seconds, say)
    except (Refused, torch.OutOfMemoryError, ImportError) as error:
        run.failure = str(error).splitlines()[0]
        say(f"{setting.name}: {run.failure}")
    run.seconds = round(time.perf_counter() - started, 1)
    return run


def _loop(
    run: Trained, learner: Learner, setting: Setting, place: Place, text: QualityText, seconds: float, say: Callable[[str], None]
) -> None:
    train_part = text.evaluation("train", EVALUATION_BATCHES, place.fragments, place.tokens)
    test_part = text.evaluation("test", EVALUATION_BATCHES, place.fragments, place.tokens)
    positions = text.positions(setting.order, setting.seed, setting.steps, place.fragments, place.tokens)
    points = sorted({point for point in POINTS if point < setting.steps} | {setting.steps})
    averages = Averages(setting, learner.weights)
    kept: dict[str, Tensor] = {}
    learner.step(text.batch(positions[0], place.tokens), 0, rate(setting.optimizer, 0, setting.steps))
    averages.add(points[0] - 1)
    clock = _Clock(place.device)
    for step in range(1, setting.steps):
        learner.step(text.batch(positions[step], place.tokens), step, rate(setting.optimizer, step, setting.steps))
        done = step + 1
        averages.add(next(point for point in points if point >= done) - done)
        if done not in points:
            continue
        spent = clock.stop()
        kept = averages.take()
        point = Point(done, done * place.fragments * place.tokens, _mean(learner, train_part)[0], _mean(learner, test_part)[0])
        point.averages = {name: _mean(learner, test_part, weights)[0] for name, weights in kept.items()}
        run.points.append(point)
        run.step_ms = spent / (done - 1) * 1e3
        say(f"{setting.name}: {done} steps, train {point.train:.4f} test {point.test:.4f}{_averages_text(point)} {run.step_ms:.1f} ms/step")
        if not math.isfinite(point.test):
            raise Refused("loss-not-finite", f"diverged before step {done}")
        if spent > seconds:
            break
        clock.go()
    whole = text.whole_test(place.fragments, place.tokens)
    run.whole_test["last"], run.batch_deviation = _mean(learner, whole)
    run.whole_test |= {name: _mean(learner, whole, weights)[0] for name, weights in kept.items()}


def _averages_text(point: Point) -> str:
    return "".join(f" {name} {loss:.4f}" for name, loss in point.averages.items())


def _mean(learner: Learner, batches: Sequence[Batch], weights: Tensor | None = None) -> tuple[float, float]:
    """(mean loss per target, standard deviation of the batches' means)."""
    targets = int((batches[0][1] >= 0).sum())
    losses = [loss / targets for loss in learner.losses(batches, weights)]
    return statistics.fmean(losses), statistics.stdev(losses) if len(losses) > 1 else 0.0


class _Clock:
    """Time spent training, evaluations left out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spent = 0.0
        self.go()

    def go(self) -> None:
        self._wait()
        self._started = time.perf_counter()

    def stop(self) -> float:
        self._wait()
        self._spent += time.perf_counter() - self._started
        return self._spent

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
