"""The reference engine in a group: gradient of the own text by autograd, exchange, the same optimizer step on every rank.

The loss that a step returns is the mean over ranks of their loss sums; one that is not finite anywhere stops all ranks alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tscale_fed.engine.interface import StepBatch, not_finite, nothing
from tscale_fed.engine.reference import ReferenceEngine
from tscale_fed.model.forward import Model
from tscale_fed.optimizer.rule import GradientNotFinite, Optimizer
from tscale_fed.parallel.exact import GradientExchange


class GroupReferenceEngine(ReferenceEngine):
    """See the module; arguments as for `ReferenceEngine`, and the exchange over the model's parameters."""

    def __init__(self, model: Model, optimizer: Optimizer, *, exchange: GradientExchange, **arguments: Any) -> None:
        super().__init__(model, optimizer, **arguments)
        self._exchange = exchange

    def step(self, batch: StepBatch, rate: float, meanwhile: Callable[[], None] = nothing) -> float:
        """See `TrainingEngine`; `meanwhile` is not called."""
        group = self._exchange.group
        loss = float(group.reduce(torch.tensor([self._gradient(batch)], dtype=torch.float64), "mean"))
        if not math.isfinite(loss):
            self.parameters.zero_grad()
            raise not_finite(f"the training loss became {loss}", batch.step)
        for index in range(len(self._exchange.buckets)):
            self._exchange.ready(index)
        self._exchange.finish()
        # On a processor a sum over a matrix may depend on the number of threads, which hosts may differ in: rank 0's counts.
        mean_squares = group.copy_leader(self.optimizer.mean_squares()) if group.device.type == "cpu" else None
        try:
            self.optimizer.step(rate, mean_squares)
        except GradientNotFinite as error:
            self.parameters.zero_grad()
            raise not_finite(str(error), batch.step) from error
        return loss
