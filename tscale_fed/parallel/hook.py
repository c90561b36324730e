"""The one-bit exchange for any model: a communication hook of torch's DistributedDataParallel.

    state = OneBitState(model.parameters(), per_row=[model.embedding.weight])
    DistributedDataParallel(model).register_comm_hook(state, onebit_hook)

Every parameter, or row of it, has one scale, the running RMS of its gradient over ranks, S = b S + s, N = b N + 1 with a constant b; the
rest is as in onebit.py. Gradients come back as +-scale * size, so any optimizer can follow; over some steps they are the mean. One bit pays
where the network is slow, and wants an optimizer with momentum. All ranks get the same bits.
DDP regroups parameters after its first step: what a parameter has not delivered moves with it.
"""

# No `from __future__ import annotations` here: DDP looks at the annotations of a hook and wants the types themselves.

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from tscale_fed.parallel.group import gather_parts
from tscale_kernels.flat_blocks import GROUP
from tscale_kernels.gradient_onebit import MAX_AUTHORS, UNITS, average, decode, encode

GROUP_BYTES = GROUP // 8


@dataclass(slots=True)
class _Moments:
    """Running second moments of one parameter's gradients."""

    squares: Tensor
    """fp32 [rows] or [1]: S."""
    count: float = 0.0


class OneBitState:
    """What one rank keeps between steps. Not for checkpoints: after a restart tails begin at zero, which costs a few steps' rounding.

    Raises ValueError for parameters that are not float32, an averaging constant outside [0, 1), and more ranks than can be averaged.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        per_row: Sequence[torch.nn.Parameter] = (),
        averaging: float = 0.95,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """`per_row`: matrices whose rows have scales of their own, such as embeddings: a row that nobody's batch uses is then left alone.
        `averaging`: b; 0.95 remembers 20 steps. `group`: None is all ranks."""
        self.group = group
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if not 0.0 <= averaging < 1.0:
            raise ValueError(f"averaging {averaging} is not at least 0 and below 1")
        if self.ranks > MAX_AUTHORS:
            raise ValueError(f"{self.ranks} ranks, one-bit gradients go up to {MAX_AUTHORS}")
        self.averaging = averaging
        self.sent_bytes = 0
        """By this rank so far."""
        self._tails: dict[torch.nn.Parameter, Tensor] = {}
        self._moments: dict[torch.nn.Parameter, _Moments] = {}
        rowwise = {id(parameter) for parameter in per_row}
        for parameter in parameters:
            if parameter.dtype != torch.float32:
                raise ValueError(f"a parameter of {parameter.dtype}: one-bit gradients are for float32 parameters")
            self._tails[parameter] = torch.zeros(parameter.numel(), device=parameter.device)
            rows = parameter.shape[0] if id(parameter) in rowwise else 1
            self._moments[parameter] = _Moments(torch.zeros(rows, device=parameter.device))
        self._buckets: dict[int, _Bucket] = {}

    def exchange(self, bucket: dist.GradBucket) -> Tensor:
        """The bucket's gradient (fp32, flat), exchanged in place."""
        found = self._bucket(bucket.index(), cast(list[torch.nn.Parameter], bucket.parameters()))
        own = bucket.buffer()
        self._set_scale(found, [own[first:last] for first, last in found.spans])
        self._average(found, own)
        return own

    def _bucket(self, index: int, parameters: list[torch.nn.Parameter]) -> "_Bucket":
        found = self._buckets.get(index)
        if found is not None and [id(p) for p in found.parameters] != [id(p) for p in parameters]:
            for each in self._buckets.values():
                self._dissolve(each)
            self._buckets.clear()
            found = None
        if found is None:
            found = self._buckets[index] = _Bucket(parameters, [self._tails[p] for p in parameters], self.ranks)
        return found

    def _dissolve(self, bucket: "_Bucket") -> None:
        """Give what the bucket has not delivered back to its parameters: the owner's residual joins the owner's tail."""
        first = self.rank * bucket.share * GROUP
        part = slice(first, first + bucket.share * GROUP)
        bucket.tail[part] += bucket.residual.float() * bucket.scale[part] / UNITS
        for parameter, (begin, end) in zip(bucket.parameters, bucket.spans, strict=True):
            self._tails[parameter] = bucket.tail[begin:end].clone()

    def _set_scale(self, bucket: "_Bucket", gradients: list[Tensor]) -> None:
        rows = [self._moments[parameter].squares.numel() for parameter in bucket.parameters]
        squares = torch.cat([g.view(count, -1).square().mean(1) for g, count in zip(gradients, rows, strict=True)])
        dist.all_reduce(squares, group=self.group)
        self.sent_bytes += 8 * squares.numel() * (self.ranks - 1) // self.ranks
        squares /= self.ranks
        for parameter, (begin, end), new in zip(bucket.parameters, bucket.spans, squares.split(rows), strict=True):
            moments = self._moments[parameter]
            moments.squares = moments.squares * self.averaging + new
            moments.count = moments.count * self.averaging + 1.0
            scale = torch.where(new == 0, 0.0, torch.sqrt(moments.squares / moments.count))
            bucket.scale[begin:end].view(new.numel(), -1).copy_(scale[:, None])

    def _average(self, bucket: "_Bucket", gradient: Tensor) -> None:
        ranks, share, own_bytes = self.ranks, bucket.share, bucket.share * GROUP_BYTES
        padded = torch.zeros_like(bucket.tail)
        padded[: gradient.numel()] = gradient
        bits, received = torch.empty(2, ranks * own_bytes, dtype=torch.uint8, device=gradient.device)
        encode(padded, bucket.tail, bucket.scale, bits)
        dist.all_to_all_single(received, bits, group=self.group)
        own = torch.empty(own_bytes + share, dtype=torch.uint8, device=gradient.device)
        own_scale = bucket.scale[self.rank * share * GROUP : (self.rank + 1) * share * GROUP]
        average(received.view(ranks, own_bytes), bucket.residual, own_scale, own[:own_bytes], own[own_bytes:])
        gathered = torch.empty(ranks * own.numel(), dtype=torch.uint8, device=gradient.device)
        gather_parts(gathered, own, self.group)
        self.sent_bytes += (ranks - 1) * (own_bytes + own.numel())
        joined = gathered.view(ranks, own.numel())
        decode(joined[:, :own_bytes].reshape(-1), joined[:, own_bytes:].reshape(-1), bucket.scale, padded, ranks)
        gradient.copy_(padded[: gradient.numel()])


class _Bucket:
    """DDP's grouping of some parameters, padded to whole shares."""

    def __init__(self, parameters: list[torch.nn.Parameter], tails: list[Tensor], ranks: int) -> None:
        self.parameters = parameters
        flat = torch.cat(tails)
        self.share = -(-flat.numel() // (GROUP * ranks))
        elements = self.share * ranks * GROUP
        self.tail = torch.nn.functional.pad(flat, (0, elements - flat.numel()))
        self.scale = torch.zeros(elements, device=flat.device)
        """fp32, of every element; 0 where there is padding."""
        self.residual = torch.zeros(self.share * GROUP, dtype=torch.int16, device=flat.device)
        self.spans: list[tuple[int, int]] = []
        begin = 0
        for tail in tails:
            self.spans.append((begin, begin + tail.numel()))
            begin += tail.numel()


def onebit_hook(state: OneBitState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What `register_comm_hook` takes, with an `OneBitState`."""
    device = bucket.buffer().device
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[device] if device.type == "cuda" else [])
    future.set_result(state.exchange(bucket))
    return future
