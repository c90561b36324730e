"""What a trainer needs of whatever computes its steps: the engine over the kernels, or the autograd reference.

Enters: a `StepBatch` on the CPU, the whole text of one step, and its rate. Leaves: the loss sum, and new weights. How many fragments go
through the device at once is the engine's own business: any split gives the same arithmetic up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tscale_fed.model.labels import input_labels
from tscale_fed.model.loss import NO_TARGET
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import Optimizer
from tscale_net.errors import Refused


class StepBatch(NamedTuple):
    """The text of a step, B fragments of T tokens, on the CPU."""

    text: Tensor
    """int64 [B, T]; only document boundaries are read off it."""
    target: Tensor
    """int64 [B, T], -1 = no target."""
    labels: Tensor
    """int64 [B, T, K]: embedding rows of every position."""
    signs: Tensor
    """fp32 [K]: +-1."""
    step: int = 0
    """Own steps done before, for refusals."""
    seed: int = 0
    """Of the rounding noise: different for every step and peer."""

    @staticmethod
    def make(
        shape: ModelShape,
        text: Tensor,
        target: Tensor,
        *,
        token_keep: Tensor | None = None,
        noise: torch.Generator | None = None,
        step: int = 0,
        seed: int = 0,
    ) -> StepBatch:
        """Labels of text [B, T] and target [B, T]: token_keep bool [B, T] drops tokens, `noise` draws noise rows (see `Model.loss`)."""
        labels, signs = input_labels(shape, text, token_keep, noise)
        return StepBatch(text, target, labels, signs, step, seed)

    @property
    def fragments(self) -> int:
        return self.text.shape[0]

    @property
    def targets(self) -> int:
        """Positions with a target."""
        return int((self.target != NO_TARGET).sum())

    def part(self, start: int, stop: int) -> StepBatch:
        """Fragments start to stop."""
        return self._replace(text=self.text[start:stop], target=self.target[start:stop], labels=self.labels[start:stop])


def nothing() -> None:
    """What there is to do while the device computes, if nothing."""


class TrainingEngine(Protocol):
    """One model on one device. Not thread-safe: one thread calls it. The weights may be changed in place between two steps."""

    @property
    def parameters(self) -> Parameters: ...

    @property
    def optimizer(self) -> Optimizer: ...

    def step(self, batch: StepBatch, rate: float, meanwhile: Callable[[], None] = nothing) -> float:
        """One step: the loss sum in nats of the batch at the present weights, whose gradient then changes them.

        `meanwhile` may be called while the device computes, for work that would keep it waiting otherwise (drawing the next batch).
        Raises Refused with weights and optimizer unchanged: "loss-not-finite" with step, layer and operation, "out-of-memory" if not even
        one fragment fits.
        """
        ...


def not_finite(what: str, step: int) -> Refused:
    """The refusal of a step whose numbers overflowed; `step`: own steps done before."""
    detail = f"{what} at step {step + 1}: go back to an older checkpoint and lower [optimizer] rate"
    return Refused("loss-not-finite", detail)
