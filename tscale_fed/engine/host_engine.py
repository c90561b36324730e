"""The engine with CPU offload: the GPU holds 8-bit weights and activations, host memory everything else (host_memory.py).

`parameters.flat`, the live weights that the swarm and checkpoints hold, are page-locked fp32 masters on the CPU; change them in place
between steps as ever. What differs from `Engine`: a step that overflows in the middle of its backward pass is made in part, and the
gradient that `accumulate` leaves is bf16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tscale_fed.engine.buffers import Buffers
from tscale_fed.engine.engine import Engine
from tscale_fed.engine.finite import FiniteCheck
from tscale_fed.engine.forward import Work
from tscale_fed.engine.gradients import gradient_scratch_bytes
from tscale_fed.engine.host_gradients import HostGradients, host_gradient_bytes
from tscale_fed.engine.host_memory import HostMemory
from tscale_fed.engine.host_pack import host_threads
from tscale_fed.engine.host_parameters import HostParameters, momentum_in
from tscale_fed.engine.host_passes import HostPasses
from tscale_fed.engine.host_transfer import transfer_for
from tscale_fed.engine.interface import StepBatch, nothing
from tscale_fed.engine.passes import Runner
from tscale_fed.engine.precision import Precision
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import Optimizer
from tscale_kernels.dispatch import BackendName
from tscale_kernels.host_update import HostBackendName, choose_host
from tscale_kernels.optimizer_step import ALL_FINITE


class HostEngine(Engine):
    """See the module; arguments as for `Engine`, and where to compute. `close` it before its weights are let go."""

    def __init__(
        self,
        parameters: HostParameters,
        optimizer: Optimizer,
        bias2: Tensor | None,
        *,
        device: torch.device,
        precision: Precision,
        fragments: int,
        tokens: int,
        doc_start_token: int | None,
        micro_batch: int = 0,
        plan: str = "auto",
        stream: torch.dtype = torch.float32,
        graphs: bool | None = None,
        backend: BackendName | None = None,
        host_backend: HostBackendName | None = None,
        threads: int | None = None,
        threaded: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """device: of the computation. host_backend: forces the update in "native" or "torch"; threads: of it, None = all cores but two.
        threaded: False updates in the caller's thread, for tests."""
        self._device = device
        self._host = choose_host(threads or host_threads(), host_backend)
        self._threaded = threaded
        self._rate: float | None = None
        momentum = momentum_in(parameters.memory, parameters)
        momentum.copy_(optimizer.momentum)
        optimizer.momentum = momentum
        self._masters = parameters
        super().__init__(
            parameters, optimizer, bias2, precision=precision, fragments=fragments, tokens=tokens, doc_start_token=doc_start_token,
            micro_batch=micro_batch, plan=plan, stream=stream, graphs=graphs, backend=backend, say=say,
        )  # fmt: skip
        size = parameters.memory.bytes
        share = f"{size / parameters.flat.numel():.1f} bytes per weight"
        say(f"weights and momentum: {size / 1e9:.1f} GB of the machine's memory ({share}), {self._host_words()}")

    @property
    def device(self) -> torch.device:
        return self._device

    def step(self, batch: StepBatch, rate: float, meanwhile: Callable[[], None] = nothing) -> float:
        """As `Engine.step`; after a refusal because numbers overflowed, upper layers may have made the step: go back to a checkpoint."""
        self._rate = rate
        try:
            return super().step(batch, rate, meanwhile)
        finally:
            self._rate = None

    def close(self) -> None:
        """End the thread and unlock the host memory."""
        self._memory.close()
        self._masters.memory.close()

    # -- where weights and gradient are kept -------------------------------------------------------------------------

    def _room(self) -> int | None:
        room = super()._room()
        shape = self.parameters.shape
        return None if room is None else room - device_bytes(shape) + gradient_scratch_bytes(shape)

    def _place(self) -> None:
        shape = self.parameters.shape
        gradients = HostGradients(shape, self.device)
        self._gradients = gradients
        self._table = torch.zeros(shape.embedding_rows, shape.width, device=self.device)
        self._memory = HostMemory(
            self._masters, self.optimizer, self._weights, self._table, gradients, transfer=transfer_for(self.device), host=self._host,
            threaded=self._threaded, backend=self._backend,
        )  # fmt: skip
        self._update = self._host_update = HostUpdate(self._memory)

    def _runner(self, work: Work, check: FiniteCheck) -> Runner:
        return HostPasses(work, self._memory, check, graphs=self._graphs)

    def _run(self, batch: StepBatch) -> tuple[Buffers, FiniteCheck]:
        self._prepared(batch)  # memory may run out here, and change the number of micro-batches
        self._memory.begin_step(self._rate, len(self._parts(batch)))
        try:
            return super()._run(batch)
        except BaseException:
            self._host_update.gather()
            raise

    def _read(self, batch: StepBatch, buffers: Buffers, check: FiniteCheck, *, updated: bool) -> float:
        self._host_update.gather()
        return super()._read(batch, buffers, check, updated=updated)

    def _host_words(self) -> str:
        if self._host.name == "native":
            return f"updated on {self._host.threads} threads"
        return self._host.reason


class HostUpdate:
    """An `update.Update`: the update was made while the gradient was computed, what remains is to say how it went."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._bad: str | None = None
        self.bad_matrix = torch.full((1,), ALL_FINITE, dtype=torch.int32)

    def gather(self) -> None:
        """Wait for the host."""
        self._bad = self._memory.finish()
        self.bad_matrix.fill_(ALL_FINITE if self._bad is None else 0)

    def launch(self, rate: float, peaks: Tensor, loss_sum: Tensor) -> None:
        """Nothing: every matrix has been on its way since its gradient was there."""

    def verdict(self, bad_matrix: int) -> str | None:
        if self._bad is None:
            self._memory.optimizer.count_step()
            return None
        return f"the gradient of {self._bad}"


def device_bytes(shape: ModelShape) -> int:
    """What host mode needs on the device beside codes and buffers: gradients on their way, the embedding, codes that arrive."""
    largest = max(rows * columns for _, rows, columns in shape.tensors()[1:])
    joined = 4 * shape.heads_width * shape.width
    return host_gradient_bytes(shape) + 4 * shape.embedding_rows * shape.width + 2 * max(largest, joined)
