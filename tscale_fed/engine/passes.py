"""One micro-batch, forward and backward, as CUDA graphs on a GPU and step by step elsewhere.

Two passes differ: the first of a step packs the weights anew and overwrites the gradient, each further one adds to it. A graph is captured
after one run that compiles the kernels; both are captured before the first step counts, so what that run leaves behind is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tscale_fed.engine.backward import BackwardWork, backward
from tscale_fed.engine.finite import FiniteCheck
from tscale_fed.engine.forward import Work, forward
from tscale_fed.engine.gradients import WeightGradients
from tscale_kernels.head import loss


class Runner(Protocol):
    """Runs micro-batches over static buffers."""

    def prepared(self, several: bool) -> bool:
        """Whether `prepare` has nothing to do."""
        ...

    def prepare(self, several: bool) -> None:
        """Compile kernels and capture what a step needs; `several`: more than one micro-batch. The inputs in the buffers are used."""
        ...

    def run(self, accumulate: bool) -> None:
        """The micro-batch in the buffers: gradient and loss sum overwritten, or with `accumulate` added to. Nothing is waited for."""
        ...

    def score(self) -> None:
        """The loss sum of the micro-batch in the buffers, without a gradient and without a graph."""
        ...


class Passes:
    """A `Runner` over the buffers of `work`, with weights and gradient on the device."""

    def __init__(self, work: Work, gradients: WeightGradients, flat: Tensor, check: FiniteCheck, *, graphs: bool) -> None:
        """`flat`: fp32 [parameters], the live weights; graphs: capture CUDA graphs at the first run."""
        ones = torch.ones(1, device=flat.device)
        self._work = work
        self._flat = flat
        self._check = check
        self._first = BackwardWork(work, gradients, ones, accumulate=False)
        self._further = BackwardWork(work, gradients, ones, accumulate=True)
        self._graphs: dict[bool, torch.cuda.CUDAGraph] | None = {} if graphs else None

    def prepared(self, several: bool) -> bool:
        return self._graphs is None or (False in self._graphs and (True in self._graphs or not several))

    def prepare(self, several: bool) -> None:
        if self._graphs is None:
            return
        for accumulate in (False, True) if several else (False,):
            if accumulate not in self._graphs:
                self._graphs[accumulate] = capture(lambda accumulate=accumulate: self._run(accumulate))  # type: ignore[misc]

    def run(self, accumulate: bool) -> None:
        if self._graphs is None:
            self._run(accumulate)
        else:
            self._graphs[accumulate].replay()

    def score(self) -> None:
        self._begin()
        forward(self._work)
        score_loss(self._work)

    def _begin(self) -> None:
        self._work.weights.pack(self._flat, self._work.backend)
        self._work.buffers.loss_sum.zero_()
        self._check.peaks.zero_()

    def _run(self, accumulate: bool) -> None:
        work = self._work
        if not accumulate:
            self._begin()
        forward(work)
        backward(self._further if accumulate else self._first)
        self._check.note(work)


def score_loss(work: Work) -> None:
    """The loss sum after `forward`, without a gradient."""
    b, final = work.buffers, work.weights.final
    loss(
        b.final_input, final.codes, final.units, work.bias, b.target, losses=b.losses, loss_sum=b.loss_sum, scratch=b.head,
        backend=work.backend,
    )  # fmt: skip


def capture(function: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Run once on a stream of its own, then record. Other threads may use the GPU meanwhile (thread_local)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph
