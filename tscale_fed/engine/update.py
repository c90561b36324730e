"""The update at the end of a step: optimizer and weights on the device, in one pass of `optimizer_step`.

The kernel writes nothing if the step overflowed: the flag `bad_matrix` is set on the device from the finite check, so nobody has to wait
for the gradient before the update is launched. The caller reads the flag with the loss, and counts the step only if it was taken.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from tscale_fed.engine.gradients import Gradients, update_matrices
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import Optimizer
from tscale_kernels.dispatch import BackendName
from tscale_kernels.optimizer_step import ALL_FINITE, UpdatePlan, optimizer_step, step_scalars


class Update(Protocol):
    """How a step ends."""

    bad_matrix: Tensor
    """int32 [1]: ALL_FINITE if the update was made."""

    def launch(self, rate: float, peaks: Tensor, loss_sum: Tensor) -> None:
        """Update unless something is not finite: `peaks` fp32 [n], `loss_sum` fp64 [1] on the device, or a matrix's gradient."""
        ...

    def verdict(self, bad_matrix: int) -> str | None:
        """None if the update was made, else which gradient was not finite; `bad_matrix` as read from the device."""
        ...


class DeviceUpdate:
    """Weights, momentum and second moments all on the device."""

    def __init__(
        self,
        shape: ModelShape,
        parameters: Parameters,
        optimizer: Optimizer,
        gradients: Gradients,
        backend: BackendName | None,
        summed: bool = True,
    ) -> None:
        """`summed`: whether the sums of squares in `gradients` are those of the gradient at `launch`; else they are made anew."""
        device = parameters.device
        self._names = [name for name, _, _ in shape.tensors()]
        matrices = update_matrices(shape)
        self._plan = UpdatePlan(matrices if summed else [replace(matrix, sums=None) for matrix in matrices], device)
        self._square_sums = gradients.square_sums if summed else None
        self._parameters = parameters
        self._optimizer = optimizer
        self._backend = backend
        self._scalars = torch.zeros(4, device=device)
        self._weight_squares = torch.zeros(self._plan.blocks, dtype=torch.float64, device=device)
        self._weights_version: int | None = None
        self.bad_matrix = torch.full((1,), ALL_FINITE, dtype=torch.int32, device=device)

    def launch(self, rate: float, peaks: Tensor, loss_sum: Tensor) -> None:
        optimizer = self._optimizer
        scalars = torch.tensor(step_scalars(rate, optimizer.beta, optimizer.next_count, optimizer.settings.l2))
        self._scalars.copy_(scalars.pin_memory() if self._scalars.is_cuda else scalars, non_blocking=True)
        fine = peaks.isfinite().all() & loss_sum.isfinite()
        self.bad_matrix.copy_(torch.where(fine, ALL_FINITE, -1))
        optimizer_step(
            self._parameters.flat, optimizer.momentum, self._parameters.flat_grad, self._plan, scalars=self._scalars,
            moment_sums=optimizer.moment_sums, bad_matrix=self.bad_matrix, square_sums=self._square_sums,
            weight_squares=self._weight_squares, backend=self._backend,
        )  # fmt: skip
        self._weights_version = self._parameters.flat._version

    @property
    def packed_squares(self) -> Tensor:
        """fp64: sums of squares of the weights after the last update, of all matrices but the embedding: what `PackedWeights` takes."""
        return self._weight_squares[self._plan.matrices[0].span.blocks :]

    def squares_known(self) -> bool:
        """Whether nobody has changed the weights since the last update. torch counts the changes that its operations make in place."""
        return self._parameters.flat._version == self._weights_version

    def verdict(self, bad_matrix: int) -> str | None:
        if bad_matrix == ALL_FINITE:
            self._optimizer.count_step()
            return None
        return f"the gradient of {self._names[bad_matrix]}" if bad_matrix >= 0 else "the step"
