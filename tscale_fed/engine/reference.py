"""The reference engine: the autograd model behind the interface of `interface.py`.

The path of every machine without kernels, and what the engine over the kernels is checked against. A step goes through the device in groups
of `fragments` fragments; on a full GPU the groups are halved, with one line about it, until they fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tscale_fed.device import out_of_memory
from tscale_fed.engine.interface import StepBatch, not_finite, nothing
from tscale_fed.model.forward import Model
from tscale_fed.model.parameters import Parameters
from tscale_fed.optimizer.rule import GradientNotFinite, Optimizer


class ReferenceEngine:
    """Owns the autograd model of a trainer."""

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        *,
        fragments: int,
        doc_start_token: int | None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`fragments`: how many go through the device at once."""
        self.model = model
        self.optimizer = optimizer
        self._fragments = fragments
        self._doc_start_token = doc_start_token
        self._say = say

    @property
    def parameters(self) -> Parameters:
        return self.model.parameter_store

    def step(self, batch: StepBatch, rate: float, meanwhile: Callable[[], None] = nothing) -> float:
        """See `TrainingEngine`; `meanwhile` is not called. Equal groups give equal bits on a processor."""
        loss = self.accumulate(batch)
        try:
            self.optimizer.step(rate)
        except GradientNotFinite as error:
            self.parameters.zero_grad()
            raise not_finite(str(error), batch.step) from error
        return loss

    def accumulate(self, batch: StepBatch) -> float:
        """Loss sum in nats of the batch; its gradient is in `parameters.flat_grad`. Raises as `step` does, then without a gradient."""
        loss = self._gradient(batch)
        if not math.isfinite(loss):
            self.parameters.zero_grad()
            raise not_finite(f"the training loss became {loss}", batch.step)
        return loss

    def _gradient(self, batch: StepBatch) -> float:
        """Loss sum, and the gradient, in groups that fit. Raises Refused("out-of-memory")."""
        while True:
            try:
                return self._sum(batch)
            except torch.OutOfMemoryError as error:
                self.parameters.zero_grad()
                self._halve(error, batch)

    def _sum(self, batch: StepBatch) -> float:
        total = torch.zeros((), device=self.parameters.device)
        for start in range(0, batch.fragments, self._fragments):
            loss = self._loss(batch.part(start, start + self._fragments))
            loss.backward()
            total += loss.detach()
        return float(total)

    def _loss(self, part: StepBatch) -> Tensor:
        device = self.parameters.device
        plan = self.model.plan(part.text.to(device), self._doc_start_token)
        return self.model.loss_of_labels(part.labels.to(device), part.signs.to(device), plan, part.target.to(device))

    def _halve(self, error: torch.OutOfMemoryError, batch: StepBatch) -> None:
        """Half as many fragments at once from now on. Raises Refused("out-of-memory") if there was one already."""
        device, tokens = self.parameters.device, batch.text.shape[1]
        groups = min(self._fragments, batch.fragments)
        if groups == 1:
            raise out_of_memory(device, f"a step of one fragment of {tokens} tokens") from error
        self._fragments = (groups + 1) // 2
        torch.cuda.empty_cache()
        self._say(f"{device}: {groups} fragments of {tokens} tokens at once do not fit its memory: {self._fragments} at once from now on")
