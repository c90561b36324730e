"""The processes of a run as torch.distributed knows them.

Enters: a `World` and its environment. Leaves: a `Group` with the few collectives that are needed, on whatever device a tensor is: NCCL for
GPUs, gloo for processors (so small decisions between ranks never wait for a GPU). Whatever a lost process breaks becomes one refusal,
"rank-lost". NVLink multicast stays off (NCCL_NVLS_ENABLE=0): sums then have one order, and shared hosts are left in peace.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tscale_fed.parallel import limits
from tscale_fed.parallel.world import ADDRESS, PORT, World
from tscale_net.errors import Refused

Reduction = Literal["sum", "mean", "max"]

_STORE_PREFIX = "tscale-fed"
_LOST = ("gloo", "NCCL", "onnection", "imed out", "roken pipe", "ocket")
"""Words of torch's errors, which have no class of their own, when a process cannot be reached."""


class Group:
    """All processes of a run, this one among them. One thread calls it."""

    def __init__(self, world: World, device: torch.device, store: dist.Store, stop_asked: Callable[[], bool]) -> None:
        """Use `open`. `stop_asked`: whether this process was told to end."""
        self.world = world
        self.device = device
        self._store = store
        self._stop_asked = stop_asked

    @staticmethod
    def open(world: World, device: torch.device, stop_asked: Callable[[], bool] = lambda: False) -> Group:
        """Meet the others at MASTER_ADDR:MASTER_PORT. Collective: returns once all are there.

        Raises Refused: "no-rendezvous" if they do not come within RENDEZVOUS_S, "bad-world" if a rank is there twice.
        """
        os.environ["NCCL_NVLS_ENABLE"] = "0"
        # A lost rank is handled here, with a checkpoint and a sentence: torch's own watchdog would end the process at once.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        wait = timedelta(seconds=limits.RENDEZVOUS_S)
        place = f"{os.environ[ADDRESS]}:{os.environ[PORT]}"
        try:
            store, _, _ = next(dist.rendezvous("env://", rank=world.rank, world_size=world.size, timeout=wait))
            store = dist.PrefixStore(_STORE_PREFIX, store)
            if store.add(f"taken/{world.rank}", 1) > 1:
                raise Refused("bad-world", f"two processes call themselves rank {world.rank}: give every host its own ranks")
            on_gpu = device.type == "cuda"
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=world.rank, world_size=world.size,
                timeout=timedelta(seconds=limits.COLLECTIVE_S), device_id=device if on_gpu else None,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0][:160]
            what = f"rank {world.rank}: the {world.size} processes did not all meet at {place} ({first})"
            raise Refused("no-rendezvous", f"{what}: start the same command on every host") from error
        return Group(world, device, store, stop_asked)

    def close(self) -> None:
        """Leave in order. Collective; not after a lost rank."""
        if dist.is_initialized():
            dist.destroy_process_group()

    # -- collectives -------------------------------------------------------------------------------------------------
    # All raise Refused("rank-lost"). On a GPU they are enqueued on the current stream, and then a loss shows in `wait` alone.

    def reduce(self, tensor: Tensor, how: Reduction = "sum") -> Tensor:
        """All ranks' sum, mean or largest, in place; the same bits everywhere."""
        operation = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how]
        natively = how == "mean" and tensor.is_cuda
        with _lost_is_refused():
            dist.all_reduce(tensor, dist.ReduceOp.AVG if natively else operation)
        return tensor.div_(self.world.size) if how == "mean" and not natively else tensor

    def deal(self, received: Tensor, sent: Tensor) -> None:
        """Part i of `sent` goes to rank i; `received` gets one part from each, in order of ranks. Equal parts, 1-dimensional."""
        with _lost_is_refused():
            dist.all_to_all_single(received, sent)

    def gather(self, received: Tensor, sent: Tensor) -> None:
        """`received` gets `sent` of every rank, in order of ranks. 1-dimensional."""
        with _lost_is_refused():
            gather_parts(received, sent)

    def copy_leader(self, tensor: Tensor) -> Tensor:
        """Rank 0's values, in place."""
        with _lost_is_refused():
            dist.broadcast(tensor, 0)
        return tensor

    def meet(self) -> None:
        """Wait for everybody (on the processor)."""
        self.reduce(torch.zeros(1))

    def tell(self, key: str, text: str) -> None:
        """Leave a text for the others."""
        with _lost_is_refused():
            self._store.set(key, text)

    def hear(self, key: str, wait_s: float = limits.COLLECTIVE_S) -> str:
        """The text left under `key`, waiting for it."""
        with _lost_is_refused():
            self._store.wait([key], timedelta(seconds=wait_s))
            return self._store.get(key).decode()

    def wait(self, event: torch.cuda.Event) -> None:
        """Until the GPU has passed `event`, looking now and then whether it still can. Raises Refused("rank-lost")."""
        started = time.monotonic()
        while not event.query():
            time.sleep(limits.POLL_S)
            waited = time.monotonic() - started
            if waited > (limits.STUCK_AFTER_STOP_S if self._stop_asked() else limits.STUCK_S):
                raise _lost(f"nothing arrived for {waited:.0f} s")


def gather_parts(received: Tensor, sent: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Equal parts of all ranks, in order. torch has renamed it: 2.13 warns about the older name, 2.11 has no other."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(received, sent, group=group)


@contextmanager
def _lost_is_refused() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or not any(word in text for word in _LOST):
            raise
        raise _lost(text.splitlines()[0].rpartition("] ")[2].partition(". ")[0]) from error


def _lost(why: str) -> Refused:
    what = f"another process of this run has ended or cannot be reached ({why})"
    return Refused("rank-lost", f"{what}: start the same command again to go on from the last checkpoint")
