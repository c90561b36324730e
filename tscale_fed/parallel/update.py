"""The update of a group's step: all ranks' gradients are one by then, and either all ranks update or none does.

What overflowed on one rank stops every rank, with the same sentence: peaks that are not finite are marked on all of them, and losses are
averaged, so an infinite one shows everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_fed.engine.gradients import Gradients
from tscale_fed.engine.update import DeviceUpdate
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import Optimizer
from tscale_fed.parallel.exact import GradientExchange
from tscale_kernels.dispatch import BackendName


class GroupUpdate(DeviceUpdate):
    """An `engine.update.Update` after an exchange. The loss sum it leaves is the mean of all ranks' loss sums."""

    def __init__(
        self,
        shape: ModelShape,
        parameters: Parameters,
        optimizer: Optimizer,
        gradients: Gradients,
        exchange: GradientExchange,
        backend: BackendName | None,
    ) -> None:
        super().__init__(shape, parameters, optimizer, gradients, backend, summed=False)
        self._exchange = exchange

    def launch(self, rate: float, peaks: Tensor, loss_sum: Tensor) -> None:
        group = self._exchange.group
        self._exchange.finish()
        bad = (~peaks.isfinite()).to(torch.int32)
        peaks.masked_fill_(group.reduce(bad, "max") > 0, torch.inf)
        group.reduce(loss_sum, "mean")
        super().launch(rate, peaks, loss_sum)
