"""The engine in a group: its step, with the exchange between the backward pass and the update.

    micro-batches but the last -> the last one in stages, exchanging -> update -> read loss and flag, once
The loss that a step returns is the mean over ranks of their loss sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tscale_fed.engine.buffers import Buffers
from tscale_fed.engine.engine import Engine, on_device
from tscale_fed.engine.finite import FiniteCheck
from tscale_fed.engine.forward import Work
from tscale_fed.engine.gradients import Gradients
from tscale_fed.engine.interface import StepBatch
from tscale_fed.engine.passes import Runner
from tscale_fed.model.parameters import Parameters
from tscale_fed.optimizer.rule import Optimizer
from tscale_fed.parallel.exact import GradientExchange
from tscale_fed.parallel.passes import GroupPasses
from tscale_fed.parallel.update import GroupUpdate


class GroupEngine(Engine):
    """See the module; arguments as for `Engine`, and the exchange over `parameters`."""

    def __init__(
        self, parameters: Parameters, optimizer: Optimizer, bias2: Tensor | None, *, exchange: GradientExchange, **arguments: Any
    ) -> None:
        self._exchange = exchange
        super().__init__(parameters, optimizer, bias2, **arguments)

    def accumulate(self, batch: StepBatch) -> float:
        """As `Engine.accumulate`, with the gradient that the ranks would step along, and the loss sum of this rank."""
        with on_device(self.device):
            buffers, check = self._run(batch)
            self._exchange.finish()
            return self._read(batch, buffers, check, updated=False)

    def _place(self) -> None:
        super()._place()
        assert isinstance(self._gradients, Gradients)
        update = GroupUpdate(self.parameters.shape, self.parameters, self.optimizer, self._gradients, self._exchange, self._backend)
        self._weights.square_sums = update.packed_squares
        self._squares_known = update.squares_known
        self._update = update

    def _runner(self, work: Work, check: FiniteCheck) -> Runner:
        return GroupPasses(
            work, self._gradients, self.parameters.flat, check, self._exchange, graphs=self._graphs, squares_known=self._squares_known
        )

    def _run(self, batch: StepBatch) -> tuple[Buffers, FiniteCheck]:
        if batch.text.shape[1] != self.plan.sizes.tokens:
            raise ValueError(f"fragments of {batch.text.shape[1]} tokens, the engine was built for {self.plan.sizes.tokens}")
        buffers, check, passes = self._prepared(batch)
        assert isinstance(passes, GroupPasses)
        parts = self._parts(batch)
        for index, part in enumerate(parts):
            buffers.load(part, index, self._doc_start_token)
            if index == len(parts) - 1:
                passes.run_last(accumulate=index > 0)
            else:
                passes.run(accumulate=index > 0)
        return buffers, check

    def _wait(self) -> None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._exchange.group.wait(event)
