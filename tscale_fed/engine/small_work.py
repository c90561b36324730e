"""Small operations on the processor beside a GPU: on one thread.

torch spreads an operation of more than 32768 elements over all cores. For the text of a step that is 40 ms on 32 cores of a shared host,
where one core takes 1.2 ms: the threads are woken, and wait for each other, longer than there is work for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_one_thread(beside_gpu: bool = True) -> Iterator[None]:
    """Inside, torch's operations of the calling thread use one core; not `beside_gpu`: nothing changes."""
    threads = torch.get_num_threads()
    if not beside_gpu or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
