"""What stands in for training in a simulated peer: scripted moves, or noisy gradients of a bowl.

Enters: start weights, a seed. Leaves: weights that move by local steps, as a trainer's do. A real model takes the same place
(`Learner`), so that whoever simulates chooses between a thousandth of a second per step and real learning.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

DRIFT = 0.001
NOISE = 0.01
STEP_TOKENS = 1000
"""Tokens that a made-up step stands for."""
BOWL_CURVATURE = (0.03, 1.0)
"""Smallest and largest second derivative of the bowl: a model has directions that learn at once and others that take the whole run."""
BOWL_NOISE = 1.0
"""Standard deviation of the noise in each part of a gradient, beside a distance of about 1."""
BOWL_RATE = 0.05
BOWL_STEPS = 4
"""Steps of gradient that one call stands for."""


class Learner(Protocol):
    """Trains one peer's weights. All of it between meetings, on the thread that meets."""

    weights: Tensor
    """Flat, fp32: changed in place by `step`, and by the swarm between steps."""
    tokens_per_step: int

    def step(self) -> float:
        """One local step; returns its training loss."""

    def met(self, momentum_keep: float, others_batches: int) -> None:
        """After a meeting: what is left of the momentum, and how many batches the others have done."""

    def save(self) -> Any:
        """All that `load` needs to go on, the weights included."""

    def load(self, saved: Any) -> None: ...

    def donor_state(self) -> bytes | None:
        """Statistics for a newcomer, if there are any."""

    def joined(self, donor_state: bytes | None, swarm_batches: int) -> None:
        """The weights were just set to those of a running swarm."""


class _MadeUp:
    """What all made-up learners have in common: weights and a seeded generator, and nothing else to keep."""

    tokens_per_step = STEP_TOKENS

    def __init__(self, weights: Tensor, seed: int) -> None:
        self.weights = weights
        self._generator = torch.Generator().manual_seed(seed)

    def met(self, momentum_keep: float, others_batches: int) -> None:
        """Neither momentum nor schedule."""

    def save(self) -> tuple[Tensor, Tensor]:
        return self.weights.clone(), self._generator.get_state()

    def load(self, saved: tuple[Tensor, Tensor]) -> None:
        self.weights.copy_(saved[0])
        self._generator.set_state(saved[1])

    def donor_state(self) -> bytes | None:
        return None

    def joined(self, donor_state: bytes | None, swarm_batches: int) -> None:
        """Nothing to adopt."""


class ScriptedMoves(_MadeUp):
    """Seeded noise around a common drift: the algebra of a swarm without learning."""

    def step(self) -> float:
        self.weights += DRIFT + NOISE * torch.randn(self.weights.numel(), generator=self._generator)
        return 1.0


class Bowl:
    """A quadratic to learn: loss = mean of curvature / 2 * (w - target)^2. `uneven`: how far each peer's own target lies from the common
    one, beside the distance of the start; peers then pull in different directions, as with text of their own."""

    def __init__(self, start: Tensor, seed: int, uneven: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.target = start + torch.randn(start.numel(), generator=generator)
        low, high = (math.log(c) for c in BOWL_CURVATURE)
        self.curvature = torch.exp(low + (high - low) * torch.rand(start.numel(), generator=generator))
        self.uneven = uneven

    def loss(self, weights: Tensor) -> float:
        """Of the common target."""
        return float((self.curvature * (weights - self.target).square()).mean()) / 2


class BowlLearner(_MadeUp):
    """Noisy gradient descent on a bowl."""

    def __init__(self, bowl: Bowl, weights: Tensor, seed: int) -> None:
        super().__init__(weights, seed)
        size = weights.numel()
        self._shrink = 1.0 - (1.0 - BOWL_RATE * bowl.curvature) ** BOWL_STEPS
        self._noise = BOWL_RATE * BOWL_NOISE * math.sqrt(BOWL_STEPS)
        own = bowl.uneven * torch.randn(size, generator=self._generator) if bowl.uneven else 0.0
        self._target = bowl.target + own
        self._bowl = bowl

    def step(self) -> float:
        """`BOWL_STEPS` steps of gradient at once, which for a quadratic is a formula; returns the noise-free loss before it."""
        away = self._target - self.weights
        self.weights.addcmul_(away, self._shrink)
        self.weights.add_(torch.randn(away.numel(), generator=self._generator), alpha=self._noise)
        return float(torch.dot(self._bowl.curvature, away.square_())) / (2 * away.numel())
