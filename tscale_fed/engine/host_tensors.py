"""Tensors in host memory that a GPU copies from and to: whole pages, page-locked where a copy needs it, until `close`.

torch's own pinned allocator rounds sizes up to powers of two, which would cost 4 bytes per parameter; here a tensor takes what it needs.
"""

from __future__ import annotations

import mmap
import weakref

import psutil
import torch
from torch import Tensor

from tscale_net.errors import Refused

_SPARE_BYTES = 1 << 30
"""Left to everything else on the machine."""
_FOR_EVERY_GPU = 1
"""cudaHostRegisterPortable."""


class HostTensors:
    """Allocates zeros. With `pin` False (no GPU) nothing is page-locked."""

    def __init__(self, pin: bool) -> None:
        self.bytes = 0
        self._pin = pin
        self._pinned: list[Tensor] = []
        weakref.finalize(self, _unlock, self._pinned)

    def zeros(self, elements: int, dtype: torch.dtype, *, copied: bool = True) -> Tensor:
        """[elements] zeros on the CPU; `copied`: a GPU copies from it or to it. Raises Refused("out-of-memory")."""
        size = max(1, elements * dtype.itemsize)
        room = psutil.virtual_memory().available - _SPARE_BYTES
        if size > room:
            detail = (
                f"weights and momentum in the machine's memory need {size / 1e9:.1f} GB more than the {max(0, room) / 1e9:.1f} GB that are "
                'free: free some, or write optimizer_memory = "device" in [device]'
            )
            raise Refused("out-of-memory", detail)
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)  # shared memory would have no huge pages
        if hasattr(mmap, "MADV_HUGEPAGE"):
            _advise(pages)
        tensor = torch.frombuffer(pages, dtype=dtype, count=elements) if elements else torch.empty(0, dtype=dtype)
        self.bytes += size
        if self._pin and copied and elements:
            self._lock(tensor, size)
        return tensor

    def close(self) -> None:
        """Unlock the pages. Call it when no copy is under way; the tensors stay valid."""
        _unlock(self._pinned)

    def _lock(self, tensor: Tensor, size: int) -> None:
        code = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, _FOR_EVERY_GPU))
        if code != 0:
            detail = f"{size / 1e9:.1f} GB of memory cannot be page-locked for the GPU (CUDA error {code}): raise the limit (ulimit -l)"
            raise Refused("out-of-memory", detail + ', or write optimizer_memory = "device" in [device]')
        self._pinned.append(tensor)


def _unlock(pinned: list[Tensor]) -> None:
    for tensor in pinned:
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
    pinned.clear()


def _advise(pages: mmap.mmap) -> None:
    """Pages of 2 MiB where the kernel gives them: fewer misses of the address cache."""
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return
