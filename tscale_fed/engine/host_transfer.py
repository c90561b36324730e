"""Copies between a GPU and host memory beside the computation: two streams of their own on CUDA, direct calls where there is no GPU.

A `Mark` stands for the moment when the work enqueued so far is done. Gradients leave after a mark of the computation, codes return after a
mark of their last use; the computation waits for marks, never for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""(source, target) of a copy, equal shapes and dtypes."""


class Mark(Protocol):
    def wait(self) -> None:
        """Block this thread until the moment has come."""
        ...


class Transfer(Protocol):
    """`fetch`, `mark` and `before_compute` belong to the thread that computes, `put` to any one thread at a time."""

    def mark(self) -> Mark:
        """The computation as enqueued so far."""
        ...

    def fetch(self, pairs: Sequence[Pair]) -> Mark:
        """Copy device to host, after the computation enqueued so far."""
        ...

    def put(self, pairs: Sequence[Pair], then: Callable[[], None], after: Mark) -> Mark:
        """Copy host to device once `after` has come, then enqueue `then` behind the copies. Puts keep their order."""
        ...

    def before_compute(self, mark: Mark) -> None:
        """What is computed from now on comes after `mark`."""
        ...


class DirectTransfer:
    """Everything at once, for tensors on the CPU."""

    def mark(self) -> Mark:
        return _DONE

    def fetch(self, pairs: Sequence[Pair]) -> Mark:
        for source, target in pairs:
            target.copy_(source)
        return _DONE

    def put(self, pairs: Sequence[Pair], then: Callable[[], None], after: Mark) -> Mark:
        for source, target in pairs:
            target.copy_(source)
        then()
        return _DONE

    def before_compute(self, mark: Mark) -> None:
        return None


class CudaTransfer:
    """One stream for each direction. Host tensors must be page-locked, or a copy would block."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def mark(self) -> Mark:
        return _Event(torch.cuda.current_stream(self._device))

    def fetch(self, pairs: Sequence[Pair]) -> Mark:
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        return self._copy(self._down, pairs, _nothing)

    def put(self, pairs: Sequence[Pair], then: Callable[[], None], after: Mark) -> Mark:
        assert isinstance(after, _Event)
        self._up.wait_event(after.event)
        return self._copy(self._up, pairs, then)

    def before_compute(self, mark: Mark) -> None:
        assert isinstance(mark, _Event)
        torch.cuda.current_stream(self._device).wait_event(mark.event)

    def _copy(self, stream: torch.cuda.Stream, pairs: Sequence[Pair], then: Callable[[], None]) -> Mark:
        with torch.cuda.stream(stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            then()
            return _Event(stream)


def transfer_for(device: torch.device) -> Transfer:
    return CudaTransfer(device) if device.type == "cuda" else DirectTransfer()


class _Event:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(blocking=True)  # whoever waits sleeps: the cores have weights to update
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()


class _Done:
    def wait(self) -> None:
        return None


_DONE = _Done()


def _nothing() -> None:
    return None
