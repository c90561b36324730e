"""The one-bit exchange: a sign per weight and rank, error tails at every rank, exact second moments (TScale).

For every part, R ranks, with S, N of the optimizer before the step and beta its averaging constant:
    s      = mean over ranks of the mean square of each matrix (or row) of their gradients     all-reduced first, fp32
    scale  = sqrt((beta S + s) / (beta N + 1))     the running RMS, this step included; the same on all ranks, so it needs no sending
    bits   = sign(tail + g), tail keeps the rest   to the rank that owns that R-th of the part
    out    = average of the bits, residual kept    at the owner, then gathered by all; g := +-scale, so h = +-1 in the update rule
A matrix or row without a gradient on any rank (s = 0: tokens that nobody saw) is left alone. The arithmetic, and why nothing is lost, is in
tscale_kernels/gradient_onebit.py.

Why an owner per part and not TScale's recursive doubling: it takes any number of ranks, sends 2 (R - 1) / R bits per weight where doubling
sends log2(R), loses to rounding once and not at each level, and for R = 2 it is the same rule. TScale subtracts a scale that includes a
rank's own s, while receivers step by the common one; with s shared first both are one, and tails hold exactly what was not delivered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_fed.model.parameters import Parameters
from tscale_fed.optimizer.rule import Optimizer
from tscale_fed.parallel.buckets import Bucket
from tscale_fed.parallel.exact import SideStream
from tscale_fed.parallel.group import Group
from tscale_kernels.flat_blocks import GROUP
from tscale_kernels.gradient_onebit import average, decode, encode, first_residual

GROUP_BYTES = GROUP // 8


@dataclass(frozen=True, slots=True)
class _Part:
    """A bucket's own tensors."""

    bucket: Bucket
    moment_of_group: Tensor
    """int64 [groups]: among the bucket's moments."""
    sizes: Tensor
    """fp32 [matrices]: elements."""
    scale: Tensor
    """fp32 [R * share]: of every group; zeros fill the last share up."""
    share: int
    """Groups that one rank owns."""
    residual: Tensor
    """int8 [128 share]"""

    @property
    def groups(self) -> int:
        return self.bucket.elements // GROUP


class OneBitExchange:
    """See the module; an `exact.GradientExchange`. Memory: 4 bytes per weight for the tail, 1 / R for the residual."""

    def __init__(self, group: Group, parameters: Parameters, optimizer: Optimizer, buckets: Sequence[Bucket]) -> None:
        self.buckets = buckets
        self.group = group
        self._gradient = parameters.flat_grad
        self._optimizer = optimizer
        device, ranks = parameters.device, group.world.size
        self._side = SideStream(device)
        self.tail = torch.zeros_like(parameters.flat)
        self._mean_squares = torch.zeros_like(optimizer.moment_sums)
        self._parts = [_part(bucket, ranks, device) for bucket in buckets]
        most = max(part.share for part in self._parts) * GROUP_BYTES
        self._bits = torch.zeros(ranks * most, dtype=torch.uint8, device=device)
        self._received = torch.zeros(ranks * most, dtype=torch.uint8, device=device)
        self._own = torch.zeros(most, dtype=torch.uint8, device=device)
        shares = sum(part.share for part in self._parts) * GROUP_BYTES
        self.bytes_per_step = (ranks - 1) * (2 * shares + 8 * optimizer.moment_sums.numel() // ranks)

    def ready(self, index: int) -> None:
        part = self._parts[index]
        with self._side.after_current():
            self._share_squares(part)
            self._set_scale(part, self._mean_squares, self._optimizer.beta, self._optimizer.next_count)
            self._exchange(part)

    def finish(self) -> Tensor | None:
        self._side.join()
        return self._mean_squares

    def even_out(self) -> Tensor | None:
        """Residuals go back into the tails of their owners, then every rank gets the mean tail: what they deliver together is unchanged."""
        first, rank = first_residual(self.group.world.size), self.group.world.rank
        count = max(self._optimizer.moment_count, 1.0)
        for part in self._parts:
            self._set_scale(part, None, 1.0, count)
            begin = rank * part.share
            end = max(begin, min(part.groups, begin + part.share))
            owned = (end - begin) * GROUP
            held = (part.residual[:owned].float() - first).view(-1, GROUP) * part.scale[begin:end, None]
            self.tail[part.bucket.start + begin * GROUP : part.bucket.start + end * GROUP] += held.view(-1)
            part.residual.fill_(first)
        return self.group.reduce(self.tail, "mean")

    def take_back(self, held_back: Tensor | None) -> None:
        if held_back is None:
            self.tail.zero_()
        else:
            self.tail.copy_(held_back)
        for part in self._parts:
            part.residual.fill_(first_residual(self.group.world.size))

    # -- one part ----------------------------------------------------------------------------------------------------

    def _share_squares(self, part: _Part) -> None:
        bucket = part.bucket
        places = [self._gradient[m.start : m.stop].view(m.rows, m.columns) for m in bucket.matrices]
        if bucket.matrices[0].per_row:
            squares = torch.cat([torch.linalg.vector_norm(g, dim=1).square() / g.shape[1] for g in places])
        else:
            squares = torch.stack(torch._foreach_norm(places)).square() / part.sizes
        own = self._mean_squares[bucket.moments]
        own.copy_(squares)
        self.group.reduce(own, "mean")

    def _set_scale(self, part: _Part, mean_squares: Tensor | None, beta: float, count: float) -> None:
        """sqrt((beta S + s) / count) of every group, 0 where s is; without s, sqrt(S / count)."""
        sums = self._optimizer.moment_sums[part.bucket.moments] * beta
        if mean_squares is not None:
            new = mean_squares[part.bucket.moments]
            sums = torch.where(new == 0, 0.0, sums + new)
        torch.index_select(torch.sqrt(sums / count), 0, part.moment_of_group, out=part.scale[: part.groups])

    def _exchange(self, part: _Part) -> None:
        ranks, rank, bucket = self.group.world.size, self.group.world.rank, part.bucket
        own = part.share * GROUP_BYTES
        bits, received, out = self._bits[: ranks * own], self._received[: ranks * own], self._own[:own]
        gradient, scale = self._gradient[bucket.start : bucket.stop], part.scale[: part.groups]
        encode(gradient, self.tail[bucket.start : bucket.stop], scale, bits[: part.groups * GROUP_BYTES])
        self.group.deal(received, bits)
        average(received.view(ranks, own), part.residual, part.scale[rank * part.share : (rank + 1) * part.share], out)
        self.group.gather(bits, out)
        decode(bits, scale, gradient)


def _part(bucket: Bucket, ranks: int, device: torch.device) -> _Part:
    groups = bucket.elements // GROUP
    share = -(-groups // ranks)
    counts, moments = [], []
    for matrix in bucket.matrices:
        each = matrix.columns // GROUP * (1 if matrix.per_row else matrix.rows)
        first = matrix.moment - bucket.matrices[0].moment
        moments.append(torch.arange(first, first + matrix.moments))
        counts.append(torch.full((matrix.moments,), each))
    index = torch.repeat_interleave(torch.cat(moments), torch.cat(counts)).to(device)
    residual = torch.full((share * GROUP,), first_residual(ranks), dtype=torch.int8, device=device)
    sizes = torch.tensor([float(matrix.rows * matrix.columns) for matrix in bucket.matrices], device=device)
    return _Part(bucket, index, sizes, torch.zeros(ranks * share, device=device), share, residual)
