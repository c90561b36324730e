"""The ways to train that are compared, and one measurement of one of them.

Enters: a plan (model, batch, steps, peers), a row, a rate, a seed. Leaves: held-out losses and bytes.

All rows start from the same weights of the seed, make the same number of steps with the same warm-up, and read the same text: peer k's
batch of step t is drawn from (seed, k, t) in every row. What differs:

    one       peer 0 alone
    sync      synchronous training: the gradient of all P peers' batches in every step (exact, nothing compressed, no lag)
    sign      the swarm's default: sum rule, 1-bit packets
    exact     sum rule, uncompressed packets
    average   averaging rule (own leak 1, momentum kept), 1-bit packets

Two losses are taken. "last": the weights after the last step; of a swarm its basepoint, after everything under way was delivered, without
the displacements, which only their peers have. "mean": the mean of these weights at the last few points of the run, the same points in
every row; it takes out the noise of a constant rate, which helps one peer most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from tscale_fed.assembly import build_evaluator, build_trainer
from tscale_fed.bench.in_process_swarm import InProcessSwarm
from tscale_fed.config import BatchSection, DataSection, EvalSection, ModelSection, OptimizerSection, RunConfig, RunSection, SwarmSection
from tscale_fed.data.token_data import Batch, TokenData
from tscale_fed.device import Device, choose_device
from tscale_fed.new_run import create_run
from tscale_fed.trainer import Trainer
from tscale_net.errors import Refused
from tscale_net.ports import SystemClock
from tscale_peers.assembly import RunTerms
from tscale_peers.manifest import RuleSpec, RunManifest

ONE, SYNC, SIGN, EXACT, AVERAGE = "one", "sync", "sign", "exact", "average"
SWARM_ROWS = (SIGN, EXACT, AVERAGE)
ROWS = (ONE, SYNC, *SWARM_ROWS)

EXACT_CHUNK_PARAMS = 1 << 16
"""Uncompressed packets of 256 kB: 32 times the bits of the usual ones must still fit in a message."""
_AVERAGING_RULE = RuleSpec(own_leak="one", momentum_keep="one")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What all rows of one bench have in common."""

    dims: str
    fragments: int
    """Per step and peer."""
    length: int
    """Tokens per fragment."""
    steps: int
    warmup_steps: int
    peers: int = 4
    publish_every_steps: int = 5
    eval_fragments: int = 64
    """Fragments that go through the device at once in an evaluation."""
    eval_batches: int = 8
    mean_points: int = 5
    """Weights that the "mean" loss is taken over: those at the last step and at equal distances before it."""
    mean_every_steps: int = 20
    curve_points: int = 5
    """Losses during the run, at equal distances."""
    device: str = "cpu"

    def is_mean_point(self, step: int) -> bool:
        left = self.steps - step
        return left % self.mean_every_steps == 0 and left < self.mean_points * self.mean_every_steps

    def is_curve_point(self, step: int) -> bool:
        return step % max(1, self.steps // self.curve_points) == 0 and step < self.steps


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one row. Losses in nats per token; None if the run diverged, and `failure` says how."""

    row: str
    rate: float
    seed: int
    last_loss: float | None = None
    mean_loss: float | None = None
    curve: list[tuple[int, float]] = []
    """(step, loss of the weights then)."""
    sent_bytes: int = 0
    """By one peer to one other, over the run."""
    received_bytes: int = 0
    """By one peer from all others."""
    exchanges: int = 0
    parameters: int = 0
    seconds: float = 0.0
    failure: str = ""


class Learner(Protocol):
    """What a row looks like to the measurement."""

    def step(self) -> None: ...

    def basepoint(self) -> torch.Tensor: ...

    def settle(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Alone:
    """One trainer; its weights are its basepoint."""

    trainer: Trainer

    def step(self) -> None:
        self.trainer.step()

    def basepoint(self) -> torch.Tensor:
        return self.trainer.weights.detach().to("cpu", copy=True)

    def settle(self) -> None:
        """Nothing is under way."""


class JoinedBatches(TokenData):
    """Token data whose batch is that of all peers, one after the other: what synchronous training reads."""

    def __init__(self, data: TokenData, peer_ids: list[str]) -> None:
        super().__init__(data.directory, data.manifest)
        self._peer_ids = peer_ids

    def batch(self, run_seed: int, peer_id: str, step: int, fragments: int, length: int) -> Batch:
        """`fragments` must be a multiple of the number of peers; `peer_id` is not used."""
        each = fragments // len(self._peer_ids)
        parts = [super(JoinedBatches, self).batch(run_seed, peer, step, each, length) for peer in self._peer_ids]
        return torch.cat([text for text, _ in parts]), torch.cat([target for _, target in parts])


Progress = Callable[[int], None]
"""Called with the steps done."""


def measure(plan: Plan, data_folder: Path, row: str, rate: float, seed: int, progress: Progress = lambda step: None) -> Measured:
    """Train one row once. A run that diverges is a result, not an error.

    Raises Refused for anything else that does not work.
    """
    clock = SystemClock()
    started = clock.now()
    data, device = TokenData.open(data_folder), choose_device(plan.device)
    config = run_config(plan, row, rate, seed)
    manifest, start = make_run(config, row, data)
    learner = make_learner(config, manifest, row, data, device, start, clock, plan.peers)
    evaluator = build_evaluator(config.recipe(), data, config.eval, device, clock)
    curve: list[tuple[int, float]] = []
    total, points = torch.zeros_like(start, dtype=torch.float64), 0
    try:
        for step in range(1, plan.steps + 1):
            learner.step()
            if step == plan.steps:
                learner.settle()
            if plan.is_mean_point(step):
                total += learner.basepoint()
                points += 1
            if plan.is_curve_point(step):
                curve.append((step, evaluator.loss(learner.basepoint()).loss))
            progress(step)
    except Refused as refused:
        if refused.code not in ("loss-not-finite", "not-finite", "out-of-range"):
            raise
        return Measured(row=row, rate=rate, seed=seed, curve=_finite(curve), seconds=clock.now() - started, failure=refused.detail)
    last = evaluator.loss(learner.basepoint()).loss
    mean = evaluator.loss((total / points).to(torch.float32)).loss
    swarm = learner if isinstance(learner, InProcessSwarm) else None
    return Measured(
        row=row,
        rate=rate,
        seed=seed,
        last_loss=last if math.isfinite(last) else None,
        mean_loss=mean if math.isfinite(mean) else None,
        curve=_finite(curve),
        sent_bytes=swarm.sent_bytes if swarm else 0,
        received_bytes=swarm.received_bytes if swarm else 0,
        exchanges=swarm.exchanges if swarm else 0,
        parameters=start.numel(),
        seconds=clock.now() - started,
        failure="" if math.isfinite(last) and math.isfinite(mean) else "the loss is not finite",
    )


def run_config(plan: Plan, row: str, rate: float, seed: int) -> RunConfig:
    """The run file that this row would have.

    The rate rises with the batches of the whole run, so the warm-up is stated in them: the same number of steps in every row.
    """
    batches_per_step = plan.peers if row in SWARM_ROWS else 1
    fragments = plan.fragments * (plan.peers if row == SYNC else 1)
    rule = _AVERAGING_RULE if row == AVERAGE else RuleSpec()
    return RunConfig(
        run=RunSection(name="bench", seed=seed),
        model=ModelSection(dims=plan.dims),
        data=DataSection(),
        batch=BatchSection(fragments=fragments, length=plan.length),
        optimizer=OptimizerSection(rate=rate, warmup_batches=plan.warmup_steps * batches_per_step),
        swarm=SwarmSection(
            budget_batches=plan.steps * batches_per_step,
            publish_every_steps=plan.publish_every_steps,
            share_scale=rule.share_scale,
            own_leak=rule.own_leak,
            momentum_keep=rule.momentum_keep,
            chunk_params=EXACT_CHUNK_PARAMS if row == EXACT else SwarmSection().chunk_params,
        ),
        eval=EvalSection(fragments=plan.eval_fragments, batches=plan.eval_batches),
    )


def make_run(config: RunConfig, row: str, data: TokenData) -> tuple[RunManifest, torch.Tensor]:
    """Manifest and start weights on its grid, which all rows of a seed share. The run's date is 0: a run is a function of its seed."""
    manifest, start = create_run(config, data, admin_key=bytes(32), created_unix=0.0)
    return (msgspec.structs.replace(manifest, codec="exact").check() if row == EXACT else manifest), start


def make_learner(
    config: RunConfig, manifest: RunManifest, row: str, data: TokenData, device: Device, start: torch.Tensor, clock: SystemClock, peers: int
) -> Alone | InProcessSwarm:
    """The row's trainers at step 0."""
    ids = [f"peer-{index}" for index in range(peers)]

    def trainer(peer_id: str, text: TokenData) -> Trainer:
        budget = config.swarm.budget_batches
        return build_trainer(config.recipe(), text, device, start, peer_id=peer_id, budget_batches=budget, clock=clock)

    if row == ONE:
        return Alone(trainer(ids[0], data))
    if row == SYNC:
        return Alone(trainer(ids[0], JoinedBatches(data, ids)))
    return InProcessSwarm(RunTerms.of(manifest), start, [trainer(peer_id, data) for peer_id in ids], clock)


def _finite(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, loss) for step, loss in curve if math.isfinite(loss)]
