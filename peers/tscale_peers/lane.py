"""A way beside the training stream: how other threads read a GPU's tensors, encode them and upload to it, without waiting for a step.

A step is enqueued on the GPU as a whole, so whatever is enqueued behind it on the same stream waits for all of it. A lane is a second
stream that waits for one thing only: the writes that the owner of the tensors has marked.
    owner, after writing      lane.mark()
    any thread                with lane: ...          what is launched inside runs on the lane, behind the newest mark
                              lane.fetch(values)      an independent copy on the CPU, complete when it returns
Who reads what the owner may write next holds the owner's lock while it reads. On a processor a lane is nothing: there, everything has
happened when it returns.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch
from torch import Tensor


class Lane:
    """One per device and owner. Threads take turns inside it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._turn = threading.RLock()
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._written = torch.cuda.Event()
            self._inside: list[torch.cuda.StreamContext] = []
            self.mark()

    def mark(self) -> None:
        """What this thread has launched so far is to be seen by the lane."""
        if self._cuda:
            self._written.record(torch.cuda.current_stream(self.device))

    def __enter__(self) -> Lane:
        self._turn.acquire()
        if self._cuda:
            self._stream.wait_event(self._written)
            context = torch.cuda.stream(self._stream)
            context.__enter__()
            self._inside.append(context)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Waits until what was launched inside is done."""
        if self._cuda:
            self._inside.pop().__exit__(kind, error, trace)
            self._stream.synchronize()
        self._turn.release()

    def fetch(self, values: Tensor) -> Tensor:
        """A copy on the CPU; `values` may be changed as soon as this returns."""
        if not self._cuda:
            return values.clone()
        with self:
            copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            copy.copy_(values, non_blocking=True)
        return copy


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Inside, `device` is the current GPU of this thread: Triton launches on that one. Nothing on a processor."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what this thread launched."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
