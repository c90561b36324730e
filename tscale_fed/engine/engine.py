"""The engine: steps over the kernels, in buffers that are allocated once from the memory plan.

    step: per micro-batch copy its text in, run forward and backward (one CUDA graph) -> update -> read loss, peaks and flag, once
The weights stay in fp32 in the flat buffer of `Parameters` and may be changed between steps, in place and by torch's operations (torch does
not notice changes through `.data` or NumPy): each step packs them anew. Any split in micro-batches gives the same arithmetic up to rounding
(each has its own noise and its own scales of gradients).
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tscale_fed.engine.buffers import Buffers
from tscale_fed.engine.finite import FiniteCheck
from tscale_fed.engine.forward import Work
from tscale_fed.engine.gradients import Gradients, WeightGradients
from tscale_fed.engine.interface import StepBatch, not_finite, nothing
from tscale_fed.engine.memory_plan import choose_plan, smaller
from tscale_fed.engine.packed import PackedWeights
from tscale_fed.engine.passes import Passes, Runner
from tscale_fed.engine.precision import Precision
from tscale_fed.engine.update import DeviceUpdate, Update
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import Optimizer
from tscale_kernels.dispatch import BackendName
from tscale_kernels.head import PADDING_BIAS
from tscale_net.errors import Refused


class Engine:
    """A model in training on one device; see `TrainingEngine` for the interface and `build.build_engine` for the arguments."""

    def __init__(
        self,
        parameters: Parameters,
        optimizer: Optimizer,
        bias2: Tensor | None,
        *,
        precision: Precision,
        fragments: int,
        tokens: int,
        doc_start_token: int | None,
        micro_batch: int = 0,
        plan: str = "auto",
        stream: torch.dtype = torch.float32,
        graphs: bool | None = None,
        backend: BackendName | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        shape, device = parameters.shape, self.device
        self._doc_start_token = doc_start_token
        self._graphs = device.type == "cuda" if graphs is None else graphs
        self._backend = backend
        self._say = say
        self._bias = padded_bias(shape, bias2, device)
        self.plan = choose_plan(
            shape, fragments=fragments, tokens=tokens, precision=precision, free_bytes=self._room(),
            kind=plan, micro_batch=micro_batch, stream=stream,
        )  # fmt: skip
        self._weights = PackedWeights(shape, precision.code, device, transposed=True)
        self._place()
        self._ready: tuple[Buffers, FiniteCheck, Runner] | None = None
        say(str(self.plan))

    @property
    def device(self) -> torch.device:
        """Where steps are computed."""
        return self.parameters.device

    @property
    def weights(self) -> Tensor:
        """fp32 [parameters], live: change them in place between steps."""
        return self.parameters.flat

    def step(self, batch: StepBatch, rate: float, meanwhile: Callable[[], None] = nothing) -> float:
        """See `TrainingEngine`."""
        with on_device(self.device):
            buffers, check = self._run(batch)
            self._update.launch(rate, check.peaks, buffers.loss_sum)
            meanwhile()
            return self._read(batch, buffers, check, updated=True)

    def accumulate(self, batch: StepBatch) -> float:
        """Loss sum in nats of the batch; its gradient is in `parameters.flat_grad` until the next call. Raises as `step` does."""
        with on_device(self.device):
            buffers, check = self._run(batch)
            return self._read(batch, buffers, check, updated=False)

    def loss(self, batch: StepBatch) -> float:
        """Loss sum in nats of the batch, without a gradient. Raises as `step` does."""
        with on_device(self.device):
            buffers, check, passes = self._prepared(batch)
            total = 0.0
            for part in self._parts(batch):
                buffers.load(part, 0, self._doc_start_token)
                passes.score()
                total += self._read(batch, buffers, check, updated=False)
            return total

    # -- where weights and gradient are kept (host_engine.py has another answer) ---------------------------------------

    def _room(self) -> int | None:
        """Bytes that the memory plan may use."""
        return free_bytes(self.device)

    def _place(self) -> None:
        """The gradient, the update, and the embedding as forward passes read it."""
        shape = self.parameters.shape
        gradients = Gradients(shape, self.parameters)
        self._gradients: WeightGradients = gradients
        update = DeviceUpdate(shape, self.parameters, self.optimizer, gradients, self._backend)
        self._weights.square_sums = update.packed_squares
        self._squares_known = update.squares_known
        self._update: Update = update
        self._table = self.parameters.views["embedding"].detach()

    def _runner(self, work: Work, check: FiniteCheck) -> Runner:
        return Passes(work, self._gradients, self.parameters.flat, check, graphs=self._graphs, squares_known=self._squares_known)

    # -- inside a step -----------------------------------------------------------------------------------------------

    def _run(self, batch: StepBatch) -> tuple[Buffers, FiniteCheck]:
        """Loss, peaks and gradient of the batch, on the device."""
        if batch.text.shape[1] != self.plan.sizes.tokens:
            raise ValueError(f"fragments of {batch.text.shape[1]} tokens, the engine was built for {self.plan.sizes.tokens}")
        buffers, check, passes = self._prepared(batch)
        for index, part in enumerate(self._parts(batch)):
            buffers.load(part, index, self._doc_start_token)
            passes.run(accumulate=index > 0)
        return buffers, check

    def _parts(self, batch: StepBatch) -> list[StepBatch]:
        """The micro-batches."""
        fragments = self.plan.sizes.fragments
        return [batch.part(start, start + fragments) for start in range(0, batch.fragments, fragments)]

    def _read(self, batch: StepBatch, buffers: Buffers, check: FiniteCheck, *, updated: bool) -> float:
        """The one point of a step that waits for the device. Raises Refused("loss-not-finite")."""
        bad_matrix = self._update.bad_matrix
        loss_sum, peaks, bad = (each.to("cpu", non_blocking=True) for each in (buffers.loss_sum, check.peaks, bad_matrix))
        if buffers.loss_sum.is_cuda:
            self._wait()
        loss, stage = float(loss_sum), check.first(peaks)
        verdict = self._update.verdict(int(bad)) if updated else None
        if stage is not None:
            raise not_finite(f"numbers overflowed ({stage})", batch.step)
        if not math.isfinite(loss):
            raise not_finite(f"the training loss became {loss}", batch.step)
        if verdict is not None:
            raise not_finite(f"{verdict} is not finite", batch.step)
        return loss

    def _wait(self) -> None:
        """Until the GPU has done all that it was given."""
        torch.cuda.current_stream(self.device).synchronize()

    # -- memory ------------------------------------------------------------------------------------------------------

    def _prepared(self, batch: StepBatch) -> tuple[Buffers, FiniteCheck, Runner]:
        """Buffers and graphs for this batch, made smaller until they fit. Raises Refused("out-of-memory")."""
        while True:
            try:
                if self._ready is None:
                    self._ready = self._allocate()
                buffers, _, passes = self._ready
                fragments = self.plan.sizes.fragments
                if not passes.prepared(batch.fragments > fragments):
                    buffers.load(batch.part(0, fragments), 0, self._doc_start_token)
                    passes.prepare(batch.fragments > fragments)
                return self._ready
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self._ready = None
            self._shrink()

    def _allocate(self) -> tuple[Buffers, FiniteCheck, Runner]:
        buffers = Buffers(self.plan.sizes, self.device)
        work = Work(self._weights, self._table, self._bias, buffers, self._doc_start_token is not None, self._backend)
        check = FiniteCheck(work, self.device)
        return buffers, check, self._runner(work, check)

    def _shrink(self) -> None:
        device, before = self.device, self.plan
        gc.collect()
        torch.cuda.empty_cache()
        plan = smaller(before)
        if plan is None:
            detail = f"{device}: not even one fragment of {before.sizes.tokens} tokens fits its memory: free it, or take shorter fragments"
            raise Refused("out-of-memory", detail)
        self.plan = plan
        self._say(f"{device}: memory ran out with {before.sizes.fragments} fragments at once; now {plan}")


def padded_bias(shape: ModelShape, bias2: Tensor | None, device: torch.device) -> Tensor:
    """fp32 [VP], natural units, from the base-2 bias [V] (None: zero)."""
    bias = torch.full((-(-shape.vocab // 128) * 128,), PADDING_BIAS)
    bias[: shape.vocab] = 0.0 if bias2 is None else bias2.float().cpu() * math.log(2.0)
    return bias.to(device)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, `device` is the current GPU of this thread: Triton launches on that one. Nothing on a processor."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def free_bytes(device: torch.device) -> int | None:
    """What torch can still allocate on a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch says so with a class of its own, Triton only in words."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
