"""Parameters: one flat weight buffer and one flat gradient buffer in canonical order, with a named view per matrix.

What others hold is the flat buffer: the swarm mirrors it, the optimizer updates it, checkpoints store it. The views are autograd leaves
whose `.grad` are views of the gradient buffer, so a backward pass adds into it and no copy is ever made.
"""

from collections.abc import Mapping

import torch

from tscale_fed.model.init import initialise
from tscale_fed.model.shape import ModelShape

__all__ = ["Parameters", "initialise"]


class Parameters:
    """Weights and gradients of one model on one device.

    flat        [P] weights; write into it in place (inside torch.no_grad) between a backward pass and the next forward pass
    flat_grad   [P] summed gradient of the loss (descent sign), added to by every backward pass
    views       name -> [rows, columns] leaf over `flat`
    grads       name -> [rows, columns] view of `flat_grad`
    """

    def __init__(self, shape: ModelShape, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.shape = shape
        self.flat = torch.zeros(shape.trained_parameters, device=device, dtype=dtype)
        self.flat_grad = torch.zeros_like(self.flat)
        self.views: dict[str, torch.nn.Parameter] = {}
        self.grads: dict[str, torch.Tensor] = {}
        self.spans: dict[str, tuple[int, int]] = {}
        start = 0
        for name, rows, columns in shape.tensors():
            stop = start + rows * columns
            leaf = torch.nn.Parameter(self.flat[start:stop].view(rows, columns))
            self.grads[name] = self.flat_grad[start:stop].view(rows, columns)
            leaf.grad = self.grads[name]
            self.views[name] = leaf
            self.spans[name] = (start, stop)
            start = stop

    @property
    def device(self) -> torch.device:
        return self.flat.device

    def load(self, flat: torch.Tensor) -> "Parameters":
        """Copy a flat vector of the same length, any device or dtype, into the weights. Raises ValueError on another length."""
        if flat.shape != self.flat.shape:
            raise ValueError(f"weights of {flat.numel()} elements do not fit model {self.shape.dims}, which has {self.flat.numel()}")
        with torch.no_grad():
            self.flat.copy_(flat)
        return self

    def load_matrices(self, matrices: Mapping[str, torch.Tensor]) -> "Parameters":
        """Copy every named matrix into the weights. Raises KeyError on a missing name, ValueError on another shape."""
        with torch.no_grad():
            for name, view in self.views.items():
                if matrices[name].shape != view.shape:
                    raise ValueError(f"matrix {name} has shape {tuple(matrices[name].shape)}, the model {tuple(view.shape)}")
                view.copy_(matrices[name])
        return self

    def zero_grad(self) -> None:
        """Clear the gradient buffer in place (the optimizer's step does so by itself)."""
        self.flat_grad.zero_()
