"""The rule's step through `tscale_kernels.optimizer_step`: one pass over gradient, momentum and weights instead of seven.

Enters: the flat buffers and matrices of an `Optimizer`, then per step its scalars. Leaves: updated tensors, or the name of the first matrix
whose gradient is not finite, and then nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tscale_kernels.optimizer_step import ALL_FINITE, UpdateMatrix, UpdatePlan, optimizer_step, step_scalars


class KernelStep:
    """Steps of one optimizer on one device."""

    def __init__(self, matrices: Mapping[str, Tensor], per_row: tuple[str, ...], device: torch.device) -> None:
        """`matrices`: views of the gradient buffer, in the order in which they follow each other there; `per_row`: those with a second
        moment per row. Raises ValueError for columns that are not multiples of 128."""
        self._names = list(matrices)
        update, start = [], 0
        for name, matrix in matrices.items():
            update.append(UpdateMatrix(start, matrix.shape[0], matrix.shape[1], per_row=name in per_row))
            start += matrix.numel()
        self._plan = UpdatePlan(update, device)
        self._bad_matrix = torch.zeros(1, dtype=torch.int32, device=device)

    def update(
        self, weights: Tensor, momentum: Tensor, gradient: Tensor, moment_sums: Tensor, *, rate: float, beta: float, count: float, l2: float
    ) -> str | None:
        """Update all tensors (fp32) in place and clear the gradient. Waits for the step: returns the bad matrix's name, if there is one."""
        self._bad_matrix.fill_(ALL_FINITE)
        optimizer_step(
            weights, momentum, gradient, self._plan, scalars=torch.tensor(step_scalars(rate, beta, count, l2), device=weights.device),
            moment_sums=moment_sums, bad_matrix=self._bad_matrix, clear=True,
        )  # fmt: skip
        bad = int(self._bad_matrix)
        return None if bad == ALL_FINITE else self._names[bad]
