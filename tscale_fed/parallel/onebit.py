"""The one-bit exchange: a sign per weight and rank, error tails at every rank (after TScale).

For every part, R ranks, with running second moments S, N of the ranks' own gradients and the optimizer's averaging constant beta:
    s      = mean over ranks of the mean square of each matrix (or row) of their gradients     all-reduced first, fp32
    N      = beta N + 1;  S = beta S + s;  scale = sqrt(S / N)      the same on all ranks, so it needs no sending
    bits   = sign(tail + g), the tail keeps the rest                 to the rank that owns that R-th of the part
    out    = average of the bits, a residual keeps the rest          at the owner, then gathered by all, who all have the same gradient
A matrix or row without a gradient on any rank (s = 0: tokens that nobody saw) is left alone. The arithmetic, and why nothing is lost, is in
tscale_kernels/gradient_onebit.py. Sent per rank and step: 2 (R - 1) / R bits per weight, a byte per 128 weights once, s.

Why an owner per part and not TScale's recursive doubling: it takes any number of ranks, sends 2 (R - 1) / R bits per weight where doubling
sends log2(R), and loses to rounding once and not at each level. Two more things differ. TScale subtracts a scale that includes a rank's own
s, while receivers step by the common one; with s shared first both are one, and tails hold exactly what was not delivered. And TScale
normalises the update by S, the noise of single ranks included, where the exact mean has less of it; here the optimizer normalises by the
gradient that was delivered, whose loudness is told (`size`), so its state means the same as with exact gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_fed.model.parameters import Parameters
from tscale_fed.optimizer.rule import Optimizer
from tscale_fed.parallel.buckets import Bucket
from tscale_fed.parallel.exact import SideStream
from tscale_fed.parallel.group import Group
from tscale_kernels.flat_blocks import GROUP
from tscale_kernels.gradient_onebit import UNITS, average, decode, encode

GROUP_BYTES = GROUP // 8
HELD_BACK = "held_back_"
"""Names in a checkpoint begin so."""
TAIL, SQUARES = f"{HELD_BACK}gradient", f"{HELD_BACK}squares"
"""What was not delivered yet, mean of all ranks, float32 [parameters]; S of every matrix and row and then N, float32 [moments + 1]."""


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
    """int16 [128 share]"""

    @property
    def groups(self) -> int:
        return self.bucket.elements // GROUP


class OneBitExchange:
    """See the module; an `exact.GradientExchange`. Memory: 4 bytes per weight for the tail, 2 / R for the residual."""

    def __init__(self, group: Group, parameters: Parameters, optimizer: Optimizer, buckets: Sequence[Bucket]) -> None:
        self.buckets = buckets
        self.group = group
        self._gradient = parameters.flat_grad
        self._optimizer = optimizer
        device, ranks = parameters.device, group.world.size
        self._side = SideStream(device)
        self.tail = torch.zeros_like(parameters.flat)
        self._squares = torch.zeros_like(optimizer.moment_sums)
        self._count = 0.0
        self._parts = [_part(bucket, ranks, device) for bucket in buckets]
        most = max(part.share for part in self._parts)
        self._bits = torch.zeros(ranks * most * GROUP_BYTES, dtype=torch.uint8, device=device)
        self._received = torch.zeros_like(self._bits)
        self._own = torch.zeros(most * (GROUP_BYTES + 1), dtype=torch.uint8, device=device)
        self._gathered = torch.zeros(ranks * self._own.numel(), dtype=torch.uint8, device=device)
        shares = sum(part.share for part in self._parts)
        self.bytes_per_step = (ranks - 1) * (shares * (2 * GROUP_BYTES + 1) + 8 * self._squares.numel() // ranks)

    def ready(self, index: int) -> None:
        part = self._parts[index]
        with self._side.after_current():
            self._set_scale(part, self._shared_squares(part))
            self._exchange(part)

    def finish(self) -> None:
        self._side.join()
        self._count = self._next_count

    def even_out(self) -> dict[str, Tensor]:
        """Residuals go back into the tails of their owners, then every rank gets the mean tail: what they deliver together is unchanged."""
        rank, ranks = self.group.world.rank, self.group.world.size
        for part in self._parts:
            begin = min(part.groups, rank * part.share)
            end = min(part.groups, begin + part.share)
            # A residual stands for scale / (UNITS R), and of a tail 1 / R counts in the mean: the owner's tail gets R times that. The scale
            # is the running one also where the last step was silent, as then the residual is from an earlier step.
            scale = torch.sqrt(self._squares[part.bucket.moments] / max(self._count, 1.0))[part.moment_of_group[begin:end]]
            held = part.residual[: (end - begin) * GROUP].float().view(-1, GROUP) * (scale[:, None] / UNITS)
            self.tail[part.bucket.start + begin * GROUP : part.bucket.start + end * GROUP] += held.view(-1)
            part.residual.zero_()
        if ranks > 1:
            self.group.reduce(self.tail, "mean")
        return {TAIL: self.tail, SQUARES: torch.cat([self._squares, self._squares.new_tensor([self._count])])}

    def take_back(self, held_back: Mapping[str, Tensor]) -> None:
        for part in self._parts:
            part.residual.zero_()
        if TAIL in held_back and SQUARES in held_back:
            self.tail.copy_(held_back[TAIL])
            self._squares.copy_(held_back[SQUARES][:-1])
            self._count = float(held_back[SQUARES][-1])
        else:
            self.tail.zero_()
            self._squares.zero_()
            self._count = 0.0

    @property
    def _next_count(self) -> float:
        return float(torch.tensor(self._optimizer.beta * self._count + 1.0))  # as float32, which a checkpoint holds

    # -- one part ----------------------------------------------------------------------------------------------------

    def _shared_squares(self, part: _Part) -> Tensor:
        """s of the part's matrices or rows, the same on all ranks."""
        places = [self._gradient[m.start : m.stop].view(m.rows, m.columns) for m in part.bucket.matrices]
        if part.bucket.matrices[0].per_row:
            squares = torch.cat([torch.linalg.vector_norm(g, dim=1).square() / g.shape[1] for g in places])
        else:
            squares = torch.stack(torch._foreach_norm(places)).square() / part.sizes
        return self.group.reduce(squares, "mean")

    def _set_scale(self, part: _Part, squares: Tensor) -> None:
        """S, and sqrt(S / N) of every group, 0 where s is."""
        sums = self._squares[part.bucket.moments]
        sums.mul_(self._optimizer.beta).add_(squares)
        scale = torch.where(squares == 0, 0.0, torch.sqrt(sums / self._next_count))
        torch.index_select(scale, 0, part.moment_of_group, out=part.scale[: part.groups])

    def _exchange(self, part: _Part) -> None:
        ranks, rank, bucket, share = self.group.world.size, self.group.world.rank, part.bucket, part.share
        own_bytes = share * GROUP_BYTES
        bits, received = self._bits[: ranks * own_bytes], self._received[: ranks * own_bytes]
        gradient, scale = self._gradient[bucket.start : bucket.stop], part.scale[: part.groups]
        encode(gradient, self.tail[bucket.start : bucket.stop], scale, bits[: part.groups * GROUP_BYTES])
        self.group.deal(received, bits)
        own = self._own[: own_bytes + share]
        own_scale = part.scale[rank * share : (rank + 1) * share]
        average(received.view(ranks, own_bytes), part.residual, own_scale, own[:own_bytes], own[own_bytes:])
        gathered = self._gathered[: ranks * own.numel()]
        self.group.gather(gathered, own)
        joined = gathered.view(ranks, own.numel())
        bits.view(ranks, own_bytes).copy_(joined[:, :own_bytes])
        decode(bits, joined[:, own_bytes:].reshape(-1), scale, gradient, ranks)


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
    sizes = torch.tensor([float(matrix.rows * matrix.columns) for matrix in bucket.matrices], device=device)
    residual = torch.zeros(share * GROUP, dtype=torch.int16, device=device)
    return _Part(bucket, index, sizes, torch.zeros(ranks * share, device=device), share, residual)
