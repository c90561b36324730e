"""The local training loop of one peer: one call, one step.

Enters: an engine (weights, optimizer, gradient), token data, the recipe of the run. Leaves: changed weights and a `StepReport`; for
checkpoints all of its state as tensors and numbers, for joiners the small donor state.

A step sums the gradient over `accumulate` times `fragments` fragments, then applies the optimizer once. Its text, its token drops and its
input noise are functions of (run seed, peer id, own step) alone: nothing random is kept between steps, so the own step count *is* the data
position and the random state, and anybody can draw the same batch again. (With float32 on a GPU two runs of one step may differ in the last
bits, as its sums have no fixed order; on a processor with equal threads they do not.) Two counts drive the optimizer: its momentum follows
the steps of this peer (a joiner starts at its donor's count), its rate follows the batches of the whole swarm against the run's budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from blake3 import blake3

from tscale_fed import donor_state
from tscale_fed.config import Recipe
from tscale_fed.data.token_data import TokenData
from tscale_fed.engine.interface import StepBatch, TrainingEngine
from tscale_fed.engine.small_work import on_one_thread
from tscale_fed.model.labels import draw_token_keep
from tscale_fed.optimizer.rule import Optimizer
from tscale_fed.optimizer.schedule import rate
from tscale_net.errors import Refused
from tscale_net.ports import Clock

LOSS_AVERAGE_STEPS = 20
"""Time constant of the moving average of the training loss: smooth enough to read, quick enough to show a fault."""
NOISE_DOMAIN = "tscale-fed/step-noise/1"
SEED_BYTES = 8
SEED_MASK = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did."""

    step: int
    """Own steps done, this one included."""
    loss: float
    """Mean over its tokens before the update, nats per token."""
    tokens: int
    """Tokens with a target."""
    rate: float
    """Step size used."""
    seconds: float
    """Time the step took."""


class Trainer:
    """Owns the live weights while it steps. Not thread-safe: one thread calls it (`TrainingThread`, or that of `tscale train`)."""

    def __init__(
        self,
        engine: TrainingEngine,
        data: TokenData,
        recipe: Recipe,
        *,
        peer_id: str,
        budget_batches: int,
        clock: Clock,
        ranks: int = 1,
    ) -> None:
        """`budget_batches`: what the rate schedule is laid out for, in batches (= steps) of all peers together. `ranks`: processes that
        make each step together, each with a batch of its own; the engine returns the mean of their losses."""
        self.engine = engine
        self.data = data
        self.recipe = recipe
        self.peer_id = peer_id
        self.budget_batches = budget_batches
        self.steps = 0
        """Own steps in this home directory: the data position."""
        self.tokens = 0
        """Tokens with a target that own steps have seen."""
        self.loss_average = math.nan
        """Moving average of the training loss, unbiased from the first step on; NaN before it."""
        self.joined_at_step: int | None = None
        """Own step at which this peer last joined a running swarm; None if it was there from the start."""
        self._told_batches = 0
        self._told_at_step = 0
        self._averaged_steps = 0
        self._drawn: StepBatch | None = None
        """The batch of the coming step, if it was drawn while a GPU was busy with the last one."""
        self._clock = clock
        self._ranks = ranks

    @property
    def weights(self) -> torch.Tensor:
        """The live weights: float32 [parameters] on the device, in canonical order. Change them in place, between steps only."""
        return self.engine.parameters.flat

    @property
    def optimizer(self) -> Optimizer:
        """Momentum and second moments of the live weights."""
        return self.engine.optimizer

    @property
    def swarm_batches(self) -> int:
        """Batches of the whole swarm as far as known here: what was told last and own steps since. Alone: the own steps."""
        return self._told_batches + self.steps - self._told_at_step

    def tell_swarm_batches(self, batches: int) -> None:
        """State how many batches the swarm has done, own ones included. It drives the rate."""
        self._told_batches = batches
        self._told_at_step = self.steps

    def mark_joined(self) -> None:
        """The weights were just replaced by those of a running swarm: begin the join warm-up."""
        self.joined_at_step = self.steps

    @property
    def rate(self) -> float:
        """Step size of the next step."""
        since_join = None if self.joined_at_step is None else self.steps - self.joined_at_step
        return rate(self.optimizer.settings, self.swarm_batches, self.budget_batches, since_join)

    def step(self) -> StepReport:
        """One step: draw the batch and have the engine train on it.

        Raises Refused, before any weight is touched: "loss-not-finite", or "out-of-memory" on a full GPU.
        """
        started = self._clock.now()
        drawn, self._drawn = self._drawn, None
        batch = drawn if drawn is not None and drawn.step == self.steps else self._batch(self.steps)
        used_rate = self.rate
        loss = self.engine.step(batch, used_rate, self._draw_next) / batch.targets
        tokens = batch.targets * self._ranks  # every batch of a run has equally many
        self.steps += 1
        self.tokens += tokens
        self._average(loss)
        return StepReport(self.steps, loss, tokens, used_rate, self._clock.now() - started)

    def scale_momentum(self, keep: float) -> None:
        """Multiply the momentum by 0 <= keep <= 1, as the sum rule asks of an author after each publication."""
        if keep != 1.0:
            self.optimizer.scale_momentum(keep)

    # -- state -------------------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU of all that a bit-exact restore needs: weights, momentum, second moments, the optimizer's step count."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.large_tensors().items()} | self.small_tensors()

    def large_tensors(self) -> dict[str, torch.Tensor]:
        """Those of `state_tensors` that have a value for every weight, [parameters]: the live ones, on their device."""
        return {"weights": self.weights.detach(), "momentum": self.optimizer.momentum}

    def small_tensors(self) -> dict[str, torch.Tensor]:
        """The others, as CPU copies."""
        return self.optimizer.small_state()

    def state_facts(self) -> dict[str, Any]:
        """The rest of the state as JSON values. There is no random state to keep: see the module."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "loss_average": None if math.isnan(self.loss_average) else self.loss_average,
            "averaged_steps": self._averaged_steps,
            "joined_at_step": self.joined_at_step,
            "told_batches": self._told_batches,
            "told_at_step": self._told_at_step,
        }

    def load_state(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Restore what `state_tensors` and `state_facts` gave; other names in either are ignored.

        Raises Refused("wrong-checkpoint") if they belong to another model.
        """
        try:
            self.engine.parameters.load(tensors["weights"])
            self.optimizer.load_state_dict(tensors)
        except (KeyError, ValueError) as error:
            raise Refused("wrong-checkpoint", f"the checkpoint belongs to another model ({error}): use another --home") from None
        self.load_facts(facts)

    def load_facts(self, facts: Mapping[str, Any]) -> None:
        """Restore what `state_facts` gave."""
        self.steps, self.tokens = facts["steps"], facts["tokens"]
        self.loss_average = math.nan if facts["loss_average"] is None else facts["loss_average"]
        self._averaged_steps = facts["averaged_steps"]
        self.joined_at_step = facts["joined_at_step"]
        self._told_batches, self._told_at_step = facts["told_batches"], facts["told_at_step"]

    def beside_broken_step(self) -> AbstractContextManager[object]:
        """Inside, the state can be read although the step under way will never end: weights are changed at the end of a step alone."""
        return torch.cuda.stream(torch.cuda.Stream(self.weights.device)) if self.weights.is_cuda else nullcontext()

    def donor_state(self) -> bytes:
        """What a joiner adopts besides the weights: second moments and the optimizer's step count."""
        return donor_state.encode(self.optimizer.second_moments(), self.optimizer.own_steps)

    def donor_state_max_bytes(self) -> int:
        """The most that `donor_state` of any peer of this run may have."""
        return donor_state.max_bytes(self.optimizer.second_moments())

    def adopt(self, data: bytes) -> None:
        """Take a donor's `donor_state`; the momentum stays as it is (zero in a joiner).

        Raises Refused("bad-donor-state") after strict checks: the bytes come from the network.
        """
        self.optimizer.adopt(*donor_state.decode(data, self.optimizer.second_moments()))

    # -- inside a step -----------------------------------------------------------------------------------------------

    def _draw_next(self) -> None:
        """What cannot be drawn is drawn again, and then refused, when its step comes."""
        try:
            self._drawn = self._batch(self.steps + 1)
        except (Refused, OSError):
            self._drawn = None

    def _batch(self, step: int) -> StepBatch:
        """The text of a step, `step` own steps done before, with its token drops and noise."""
        with on_one_thread(beside_gpu=self.weights.is_cuda):
            return self._drawn_batch(step)

    def _drawn_batch(self, step: int) -> StepBatch:
        section, shape = self.recipe.batch, self.engine.parameters.shape
        text, target = self.data.batch(self.recipe.seed, self.peer_id, step, section.fragments * section.accumulate, section.length)
        seed = self._noise_seed(step)
        generator = torch.Generator().manual_seed(seed)
        drop = self.recipe.model.token_drop
        keep = draw_token_keep(text, 1.0 - drop, generator) if drop else None
        noise = generator if self.recipe.model.noise_rows else None
        return StepBatch.make(shape, text, target, token_keep=keep, noise=noise, step=step, seed=seed)

    def _noise_seed(self, step: int) -> int:
        """Of token drops and input noise of a step (drawn on the CPU, so that every device has the same) and of rounding."""
        # The peer id comes last and numbers hold no bar, so no two different triples give one string.
        name = f"{NOISE_DOMAIN}|{self.recipe.seed}|{step}|{self.peer_id}".encode()
        return int.from_bytes(blake3(name).digest(SEED_BYTES), "little") & SEED_MASK

    def _average(self, loss: float) -> None:
        self._averaged_steps += 1
        part = max(1.0 / LOSS_AVERAGE_STEPS, 1.0 / self._averaged_steps)
        self.loss_average = loss if self._averaged_steps == 1 else self.loss_average + part * (loss - self.loss_average)
