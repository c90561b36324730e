"""One micro-batch with weights in host memory: the forward pass, then the backward pass stage by stage, so that each gradient can leave.

As in passes.py, on a GPU what is computed is captured in CUDA graphs: here one for the forward pass and one per stage. Between them copies
are enqueued on other streams, which a graph could not tell the host about. Gradients are overwritten in every micro-batch: the host adds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tscale_fed.engine.backward import BackwardWork, embedding_stage, head_stage, layer_stage
from tscale_fed.engine.finite import FiniteCheck
from tscale_fed.engine.forward import Work, forward
from tscale_fed.engine.host_gradients import Stage, stages
from tscale_fed.engine.host_memory import HostMemory
from tscale_fed.engine.passes import capture, score_loss

FORWARD, END = "forward", "end"


class HostPasses:
    """A `passes.Runner` over the buffers of `work`."""

    def __init__(self, work: Work, memory: HostMemory, check: FiniteCheck, *, graphs: bool) -> None:
        self._work = work
        self._memory = memory
        self._check = check
        self._backward = BackwardWork(work, memory.gradients, accumulate=False)
        self._stages = stages(work.sizes.shape)
        self._graphs: dict[Stage, torch.cuda.CUDAGraph] | None = {} if graphs else None

    def prepared(self, several: bool) -> bool:
        return self._graphs is None or bool(self._graphs)

    def prepare(self, several: bool) -> None:
        if self._graphs is None:
            return
        self._memory.refresh()
        graphs = {}
        for part in (FORWARD, *self._stages, END):
            graphs[part] = capture(self._function(part))
        self._graphs.update(graphs)

    def run(self, accumulate: bool) -> None:
        if not accumulate:
            self._begin()
        self._memory.begin_micro_batch()
        self._launch(FORWARD)
        for stage in self._stages:
            self._memory.reserve(stage)
            self._launch(stage)
            self._memory.gradient_ready(stage)
        self._launch(END)

    def score(self) -> None:
        self._memory.refresh()
        self._begin()
        forward(self._work)
        score_loss(self._work)

    def _begin(self) -> None:
        self._work.buffers.loss_sum.zero_()
        self._check.peaks.zero_()

    def _launch(self, part: Stage) -> None:
        if self._graphs is None:
            self._function(part)()
        else:
            self._graphs[part].replay()

    def _function(self, part: Stage) -> Callable[[], None]:
        if part == FORWARD:
            return lambda: forward(self._work)
        if part == END:
            return lambda: self._check.note(self._work)
        return lambda: self._stage(part)

    def _stage(self, stage: Stage) -> None:
        if stage == "final":
            head_stage(self._backward)
        elif isinstance(stage, int):
            layer_stage(self._backward, stage)
        else:
            embedding_stage(self._backward)
        self._memory.gradients.finish_stage(stage, self._work.buffers)
