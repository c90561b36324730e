"""What the peers of a simulation learn, and how well the swarm's basepoint does at it.

Enters: a scenario. Leaves: a manifest with start weights, a learner for each peer, the held-out loss of any weights.
    none   a bowl (a quadratic with noisy gradients), thousandths of a second per step: traffic, churn and large swarms
    tiny   the model of this project at its smallest, on the text that ships with it: a step takes hundredths of a second of real time
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import msgspec
from torch import Tensor

from tscale_fed.sim.scenario import Scenario
from tscale_net.errors import Refused
from tscale_net.ports import Clock
from tscale_peers.manifest import RunManifest
from tscale_peers.simulated_peer import SimulatedPeer
from tscale_peers.simulated_training import Bowl, BowlLearner, Learner
from tscale_peers.simulation import small_run

BOWL_CHUNK_PARAMS = 1 << 12
"""All of it: one chunk."""
TINY_DIMS = "e128h1d2w32"
"""0.3 million weights."""
TINY_FRAGMENTS = 2
TINY_LENGTH = 32
TINY_RATE = 0.02
TINY_WARMUP_BATCHES = 50
TINY_JOIN_WARMUP_STEPS = 3
TINY_CHUNK_PARAMS = 1 << 17
"""Few chunks: what is simulated is the swarm, and each chunk costs every peer the same work again."""
TINY_EVAL_FRAGMENTS = 16
TINY_EVAL_BATCHES = 4
TINY_DATA_FOLDER = "tscale-sim-text"


class Objective(Protocol):
    """See the module's head."""

    manifest: RunManifest
    start: Tensor
    unit: str
    """Of the loss."""

    def new_learner(self, sim: SimulatedPeer, weights: Tensor) -> Learner:
        """What trains one life of a peer; takes `weights` over."""

    def loss(self, weights: Tensor) -> float:
        """Held out: of what the swarm shares."""


def objective_of(scenario: Scenario, folder: Path, clock: Clock) -> Objective:
    """folder: where imported text may lie. Raises Refused."""
    return BowlObjective(scenario) if scenario.model == "none" else TinyObjective(scenario, folder, clock)


class BowlObjective:
    """--model none."""

    unit = "of the bowl"

    def __init__(self, scenario: Scenario) -> None:
        manifest, self.start = small_run(scenario.steps_per_interval, BOWL_CHUNK_PARAMS, codec=scenario.codec, spread=scenario.spread)
        self.manifest = manifest
        self._bowl = Bowl(self.start, scenario.seed, scenario.uneven)

    def new_learner(self, sim: SimulatedPeer, weights: Tensor) -> Learner:
        # Another life draws other noise: what it lost is not made again.
        return BowlLearner(self._bowl, weights, sim.seed * 1009 + sim.lives)

    def loss(self, weights: Tensor) -> float:
        return self._bowl.loss(weights)


class TinyObjective:
    """--model tiny."""

    unit = "nats per byte"

    def __init__(self, scenario: Scenario, folder: Path, clock: Clock) -> None:
        from tscale_fed import config
        from tscale_fed.assembly import build_evaluator, prepare_data
        from tscale_fed.device import choose_device
        from tscale_fed.new_run import create_run

        batches = scenario.peers * scenario.minutes * 60 / scenario.step_s
        run = config.RunConfig(
            run=config.RunSection(name="simulated", seed=scenario.seed),
            model=config.ModelSection(dims=TINY_DIMS),
            data=config.DataSection(sources=(config.DEMO_SOURCE,), tokenizer="bytes"),
            batch=config.BatchSection(fragments=TINY_FRAGMENTS, length=TINY_LENGTH),
            optimizer=config.OptimizerSection(rate=TINY_RATE, warmup_batches=TINY_WARMUP_BATCHES, join_warmup_steps=TINY_JOIN_WARMUP_STEPS),
            swarm=config.SwarmSection(
                budget_batches=max(1, math.ceil(batches)),
                publish_every_steps=scenario.steps_per_interval,
                chunk_params=TINY_CHUNK_PARAMS,
                codec=scenario.codec,
            ),
            eval=config.EvalSection(fragments=TINY_EVAL_FRAGMENTS, batches=TINY_EVAL_BATCHES),
        )
        if scenario.uneven:
            raise Refused("bad-scenario", "--uneven goes with --model none: the small text has no parts that differ")
        self._clock = clock
        self._recipe = run.recipe()
        self._data = prepare_data(run.data, folder)
        self._device = choose_device("cpu")
        manifest, self.start = create_run(run, self._data, bytes(32), 0.0)
        self.manifest = msgspec.structs.replace(manifest, spread=scenario.spread)
        self._evaluator = build_evaluator(self._recipe, self._data, run.eval, self._device, clock)

    def new_learner(self, sim: SimulatedPeer, weights: Tensor) -> Learner:
        from tscale_fed.assembly import build_trainer

        trainer = build_trainer(
            self._recipe, self._data, self._device, weights,
            peer_id=sim.identity.peer_id, budget_batches=self.manifest.budget_batches, clock=self._clock,
        )  # fmt: skip
        return TrainerLearner(trainer, TINY_FRAGMENTS * (TINY_LENGTH - 1))

    def loss(self, weights: Tensor) -> float:
        return self._evaluator.loss(weights).loss


class TrainerLearner:
    """The trainer of production in the place of made-up moves."""

    def __init__(self, trainer: Any, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self._trainer = trainer
        self.weights: Tensor = trainer.weights

    def step(self) -> float:
        return float(self._trainer.step().loss)

    def met(self, momentum_keep: float, others_batches: int) -> None:
        self._trainer.scale_momentum(momentum_keep)
        self._trainer.tell_swarm_batches(others_batches + self._trainer.steps)

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {name: tensor.clone() for name, tensor in self._trainer.state_tensors().items()}
        return tensors, dict(self._trainer.state_facts())

    def load(self, saved: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
        self._trainer.load_state(*saved)

    def donor_state(self) -> bytes | None:
        return bytes(self._trainer.donor_state())

    def joined(self, donor_state: bytes | None, swarm_batches: int) -> None:
        if donor_state is not None:
            self._trainer.adopt(donor_state)
        self._trainer.mark_joined()
        self._trainer.tell_swarm_batches(swarm_batches)
