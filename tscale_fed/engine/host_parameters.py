"""Parameters in host memory: the fp32 masters that the swarm, the optimizer and checkpoints hold, and a bf16 gradient that the GPU fills.

The same names as `tscale_fed.model.parameters.Parameters`, so whoever holds the flat weights notices nothing; but they are on the CPU
(page-locked), the gradient is bf16 and there are no autograd leaves: only the engine trains them.
Bytes per parameter: weights 4, momentum 4 (the optimizer's), gradient 2, codes of 1 byte (host_memory.py) 1; together 11.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_fed.engine.host_tensors import HostTensors
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape


class HostParameters(Parameters):
    """See the module; `memory` allocates. Raises Refused("out-of-memory").

    flat        fp32 [P] weights, live; change them in place between steps
    flat_grad   bf16 [P] summed gradient of the last step
    views       name -> [rows, columns] view of `flat`
    grads       name -> [rows, columns] view of `flat_grad`
    spans       name -> (start, stop)
    """

    def __init__(self, shape: ModelShape, memory: HostTensors) -> None:
        self.shape = shape
        self.memory = memory
        self.flat = memory.zeros(shape.trained_parameters, torch.float32)
        self.flat_grad = memory.zeros(shape.trained_parameters, torch.bfloat16)
        self.views, self.grads, self.spans = {}, {}, {}
        start = 0
        for name, rows, columns in shape.tensors():
            stop = start + rows * columns
            self.views[name] = torch.nn.Parameter(self.flat[start:stop].view(rows, columns), requires_grad=False)
            self.grads[name] = self.flat_grad[start:stop].view(rows, columns)
            self.spans[name] = (start, stop)
            start = stop


def momentum_in(memory: HostTensors, parameters: HostParameters) -> Tensor:
    """fp32 [P] zeros for the optimizer: no copy touches it, so it is not page-locked."""
    return memory.zeros(parameters.flat.numel(), torch.float32, copied=False)
