"""One row of the rules bench: ticks, meetings, losses.

Enters: a row, a seed, a machine (rules_peers.py, rules_engine.py), a plan. Leaves: a `Ran`: losses at the end and along the way, bytes.
A tick is a step of every peer (of slower ones: of those whose turn it is). The rate rises over the first ticks and may fall to 0 over the
last part; it follows the ticks, so it is the same in every row. Every `interval` ticks peers meet; who has made `interval` own steps since
its last publication publishes. Shares are the true ones. After the last tick peers
may meet some times more without training (drain); then everything under way is delivered.

    last    the basepoint at the end (one, sync: the weights)
    mean    the mean of five basepoints, 20 ticks apart, the last one included
    ema     an exponential mean of basepoints over about 100 ticks
    mean_w  the mean of all peers' weights, which nobody has; w0: the weights of peer 0, displacement included
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from tscale_fed.bench.rules_codecs import UNIT, FlatMap, codec_of
from tscale_fed.bench.rules_meeting import HALF_PRECISION_BYTES, CentralMeeting, Meeting, OwnedMeeting, PairMeeting
from tscale_fed.bench.rules_peers import Machine
from tscale_fed.bench.rules_rows import Row
from tscale_fed.bench.rules_text import RulesText
from tscale_fed.model.init import initialise
from tscale_fed.model.shape import ModelShape

MOST_WARMUP_TICKS = 100
WARMUP_PART = 8
"""The rate rises over this fraction of the ticks, at most MOST_WARMUP_TICKS."""
MEAN_POINTS, MEAN_EVERY_TICKS = 5, 20
EMA_EVERY_TICKS, EMA_DECAY = 5, 0.95
CURVE_POINTS = 24
LOST = 6.0
"""Nats per byte: more than a model that knows nothing; such a run has diverged."""
_TURN = 1.0 - 1e-9


@dataclass(frozen=True)
class Plan:
    """What all rows of a call have in common."""

    shape: ModelShape
    peers: int
    fragments: int
    """Per step and peer."""
    tokens: int
    ticks: int
    final_fragments: int
    """Held-out fragments that the losses at the end are taken over."""
    curve_fragments: int

    def rate(self, row: Row, tick: int) -> float:
        """Of the step after `tick` ticks."""
        ticks = self.ticks * row.times
        warmup = max(1, min(MOST_WARMUP_TICKS, ticks // WARMUP_PART))
        tail = min(1.0, (1.0 - tick / ticks) / row.decay) if row.decay else 1.0
        return row.rate * min(1.0, (tick + 1.0) / warmup) * tail


@dataclass
class Ran:
    """One row with one seed. Losses in nats per byte; see the module."""

    name: str
    seed: int
    kind: str
    rate: float
    decay: float
    ticks: int
    peer_steps: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    """(tick, loss of the basepoint, of its exponential mean), over fewer fragments than `losses`."""
    received_per_weight: float = 0.0
    """Bytes per weight that a peer receives at a meeting (sync: at a step)."""
    received_bytes: float = 0.0
    """By a peer over the row."""
    displacement: float = 0.0
    """RMS of d by RMS of B before the last publication."""
    seconds: float = 0.0
    milliseconds_per_step: float = 0.0
    """Of a peer, meetings and evaluations left out."""
    failure: str = ""

    @property
    def best(self) -> float:
        """The lowest loss of anything that a peer could hand over: last, mean, ema."""
        found = [self.losses[name] for name in ("last", "mean", "ema") if name in self.losses]
        return min(found, default=math.inf) if not self.failure else math.inf

    def values(self) -> dict[str, Any]:
        return asdict(self)


class Averages:
    """Means of basepoints along a row."""

    def __init__(self, start: Tensor, ticks: int) -> None:
        self._ticks, self._samples, self._points = ticks, 0, 0
        self.ema, self._sum = start.clone(), torch.zeros_like(start)

    def note(self, tick: int, model: Callable[[], Tensor]) -> None:
        """After a tick."""
        left = self._ticks - tick
        is_point = left % MEAN_EVERY_TICKS == 0 and left < MEAN_POINTS * MEAN_EVERY_TICKS
        if tick % EMA_EVERY_TICKS and not is_point:
            return
        basepoint = model()
        if tick % EMA_EVERY_TICKS == 0:
            self._samples += 1
            # A young mean begins as an even one.
            self.ema.lerp_(basepoint, 1.0 - min(EMA_DECAY, self._samples / (self._samples + 9.0)))
        if is_point:
            self._sum += basepoint
            self._points += 1

    def mean(self) -> Tensor:
        return self._sum / max(1, self._points)


def meeting_of(row: Row, weights: Tensor, start: Tensor, flat: FlatMap) -> Meeting:
    """The row's way to meet. Raises Refused("bad-bench") for an unknown codec."""
    codec = codec_of(row.codec, flat)
    if row.kind == "central":
        return CentralMeeting(row, weights, start, codec)
    if row.kind == "noloco":
        return PairMeeting(row, weights, start, codec)
    if row.owners_codec:
        return OwnedMeeting(row, weights, start, codec, codec_of(row.owners_codec, flat))
    return Meeting(row, weights, start, codec)


class RowRun:
    """A row on its way."""

    def __init__(self, row: Row, seed: int, plan: Plan, machine: Machine, text: RulesText, start: Tensor) -> None:
        self.row, self.plan, self.machine = row, plan, machine
        self.ticks = plan.ticks * row.times
        self._peers = 1 if row.kind == "one" else plan.peers
        self._flat = FlatMap.of(plan.shape)
        machine.reset(start, seed)
        weights = machine.state.weights
        self._meeting = meeting_of(row, weights, start, self._flat) if row.swarm else None
        self._positions = text.positions(seed, self._peers, self.ticks, plan.fragments, plan.tokens, row.own_data)
        self._turns, self._done, self._since = [0.0] * self._peers, [0] * self._peers, [0] * self._peers
        self._averages = Averages(start, self.ticks)
        self.result = Ran(row.name, seed, ("owners " if row.owners_codec else "") + row.kind, row.rate, row.decay, self.ticks)
        self._training_s = 0.0

    def run(self, say: Callable[[str], None]) -> Ran:
        """To the end. A run that diverges is a result."""
        started = time.perf_counter()
        points = {round(self.ticks * (index + 1) / CURVE_POINTS) for index in range(CURVE_POINTS)} | {self.plan.ticks}
        mark = started
        try:
            for tick in range(1, self.ticks + 1):
                self._step(tick)
                self._averages.note(tick, self._model)
                if tick in points:
                    self._settle_last(tick)
                    self._wait()
                    self._training_s += time.perf_counter() - mark
                    self._point(tick)
                    mark = time.perf_counter()
            self._finish()
        except (ValueError, ArithmeticError) as error:
            self.result.failure = str(error)
        result = self.result
        result.peer_steps = sum(self._done)
        result.seconds = round(time.perf_counter() - started, 2)
        result.milliseconds_per_step = round(self._training_s / max(1, result.peer_steps) * 1e3, 4)
        self._count_bytes()
        say(_line(result))
        return result

    def _step(self, tick: int) -> None:
        row, rate = self.row, self.plan.rate(self.row, tick - 1)
        if row.kind == "sync":
            self.machine.joint_step(self._positions[:, tick - 1], rate)
            self._done = [each + 1 for each in self._done]
            return
        self._turns = [turn + row.speed_of(peer) for peer, turn in enumerate(self._turns)]
        peers = [peer for peer, turn in enumerate(self._turns) if turn >= _TURN]
        places = torch.stack([self._positions[peer, self._done[peer]] for peer in peers])
        self.machine.step(peers, places, rate)
        for peer in peers:
            self._turns[peer] -= 1.0
            self._done[peer] += 1
            self._since[peer] += 1
        if self._meeting is not None and tick % row.interval == 0:
            self._meet(self._meeting, tick)

    def _meet(self, meeting: Meeting, tick: int) -> None:
        row, state = self.row, self.machine.state
        speeds = [row.speed_of(peer) for peer in range(self._peers)]
        publishes = [steps >= row.interval for steps in self._since]
        keeps = meeting.meet(publishes, [speed / sum(speeds) for speed in speeds], measure=tick + row.interval > self.ticks)
        if any(keep != 1.0 for keep in keeps):
            state.momentum.mul_(torch.tensor(keeps, device=state.momentum.device)[:, None])
        if row.global_count:
            everybody = sum(speeds) * row.interval
            for peer, counts in enumerate(state.counts):
                counts.own_steps += everybody - speeds[peer] * row.interval
        self._since = [0 if due else steps for due, steps in zip(publishes, self._since, strict=True)]

    def _model(self) -> Tensor:
        return self.machine.state.weights[0] if self._meeting is None else self._meeting.model()

    def _settle_last(self, tick: int) -> None:
        if tick == self.ticks and self._meeting is not None:
            rms = self._meeting.displacement_rms
            self.result.displacement = rms if math.isfinite(rms) else 0.0
            speeds = [self.row.speed_of(peer) for peer in range(self._peers)]
            for _ in range(self.row.drain):
                self._meeting.meet([True] * self._peers, [speed / sum(speeds) for speed in speeds])
            self._meeting.settle()

    def _point(self, tick: int) -> None:
        if self.machine.failed():
            raise ArithmeticError(f"a gradient was not finite before tick {tick}")
        fragments = self.plan.curve_fragments
        last, ema = (self.machine.loss(model, fragments) for model in (self._model(), self._averages.ema))
        if not last < LOST:
            raise ArithmeticError(f"diverged before tick {tick}: loss {last:.3f}")
        self.result.curve.append((tick, round(last, 5), round(ema, 5)))

    def _finish(self) -> None:
        models: dict[str, Callable[[], Tensor]] = {
            "last": self._model,
            "mean": self._averages.mean,
            "ema": lambda: self._averages.ema,
        }
        if self._meeting is not None:
            models |= {"mean_w": lambda: self.machine.state.weights.mean(0), "w0": lambda: self.machine.state.weights[0]}
        for name, model in models.items():
            loss = self.machine.loss(model(), self.plan.final_fragments)
            if not math.isfinite(loss):
                raise ArithmeticError(f"the loss of {name} is not finite")
            self.result.losses[name] = round(loss, 5)

    def _count_bytes(self) -> None:
        result, size = self.result, self._flat.size
        if self._meeting is not None and self._meeting.meetings:
            result.received_per_weight = self._meeting.payloads_received / self._meeting.meetings
            result.received_bytes = self._meeting.payloads_received * size
        elif self.row.kind == "sync":
            result.received_per_weight = 2 * HALF_PRECISION_BYTES * (self._peers - 1) / self._peers
            result.received_bytes = result.received_per_weight * size * self.ticks

    def _wait(self) -> None:
        if self.machine.state.weights.is_cuda:
            torch.cuda.synchronize()


def grid_start(shape: ModelShape, seed: int, device: torch.device) -> Tensor:
    """Start weights of a seed on the swarm's grid: fp32 [n]."""
    start = initialise(shape, seed).to(device)
    return torch.round(start.double() / UNIT).mul_(UNIT).float()


def _line(result: Ran) -> str:
    if result.failure:
        return f"{result.name}, seed {result.seed}: {result.failure} ({result.seconds:.1f} s)"
    losses = " ".join(f"{name} {loss:.4f}" for name, loss in result.losses.items())
    speed = f"{result.seconds:.1f} s, {result.milliseconds_per_step:.2f} ms a step"
    return f"{result.name}, seed {result.seed}: {losses}; {result.received_bytes / 1e6:.0f} MB; {speed}"
