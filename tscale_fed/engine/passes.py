"""One micro-batch, forward and backward, as CUDA graphs on a GPU and step by step elsewhere.

Two passes differ: the first of a step, before which the weights are packed anew, overwrites the gradient, each further one adds to it. A
graph is captured after one run that compiles the kernels; all are captured before the first step counts, so what these runs leave behind is
overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from tscale_fed.engine.backward import BackwardWork, backward
from tscale_fed.engine.finite import FiniteCheck
from tscale_fed.engine.forward import Work, forward
from tscale_fed.engine.gradients import WeightGradients
from tscale_kernels.head import loss

Part = Literal["pack known", "pack", "first", "further"]
"""What is captured, in this order: weights to codes (with sums of squares at hand, or without), the first micro-batch of a step, others."""


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

    def __init__(
        self,
        work: Work,
        gradients: WeightGradients,
        flat: Tensor,
        check: FiniteCheck,
        *,
        graphs: bool,
        squares_known: Callable[[], bool] = lambda: False,
    ) -> None:
        """`flat`: fp32 [parameters], the live weights; squares_known: whether `work.weights` has the sums of their squares already; graphs:
        capture CUDA graphs at the first run."""
        self._work = work
        self._check = check
        self._squares_known = squares_known
        first = BackwardWork(work, gradients, accumulate=False)
        further = BackwardWork(work, gradients, accumulate=True)
        self._functions: dict[Part, Callable[[], None]] = {
            "pack known": lambda: work.weights.pack(flat, work.backend, squares_known=True),
            "pack": lambda: work.weights.pack(flat, work.backend),
            "first": lambda: self._run(first),
            "further": lambda: self._run(further),
        }
        self._graphs: dict[Part, torch.cuda.CUDAGraph] | None = {} if graphs else None

    def prepared(self, several: bool) -> bool:
        return self._graphs is None or ("further" if several else "first") in self._graphs

    def prepare(self, several: bool) -> None:
        if self._graphs is None:
            return
        for part, function in self._functions.items():
            if part not in self._graphs and (part != "further" or several):
                self._graphs[part] = capture(function)

    def run(self, accumulate: bool) -> None:
        if not accumulate:
            self._do("pack known" if self._squares_known() else "pack")
        self._do("further" if accumulate else "first")

    def score(self) -> None:
        self._functions["pack"]()
        self._check.peaks.zero_()
        self._work.buffers.loss_sum.zero_()
        forward(self._work)
        score_loss(self._work)

    def _do(self, part: Part) -> None:
        if self._graphs is None:
            self._functions[part]()
        else:
            self._graphs[part].replay()

    def _run(self, work: BackwardWork) -> None:
        if not work.accumulate:
            self._check.peaks.zero_()
            self._work.buffers.loss_sum.zero_()
        forward(self._work)
        backward(work)
        self._check.note(self._work)


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
