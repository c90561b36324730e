"""How peers of the rules bench meet: the swarm's rule and the rules it is compared with, on the weights of all peers at once.

Enters: weights [P, n] that were trained since the last meeting, who publishes, and with which share. Leaves: the weights with what has
arrived, and the common basepoint B in integers. Between peers there is one B, which holds what has arrived, and per peer `ahead`: its own
packets that are on their way to the others, which its own replica holds already. So W = B + ahead + d, and of a meeting:

    capture   d = W - (B + ahead)
    receive   B += what is due; ahead -= the own part of it                   d as it is
    publish   steps = c * codec(d);  ahead += steps;  d -= leak * steps / c   (leak = c: W does not move)

which is `tscale_peers.exchange` operation by operation, in the same precision (tests compare them bit by bit).

With owners (`OwnedMeeting`) an author's steps go to the owner of each chunk, who adds them up one meeting later, encodes the sum with a
codec of its own and keeps what that lost; everybody adds the result another meeting later. An author holds its contribution in `ahead`
until the packet that lists it arrives ("credit"), or gives it up at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tscale_fed.bench.rules_codecs import UNIT, StackedCodec
from tscale_fed.bench.rules_rows import Row

MOST_COEFFICIENT = 1.0
HALF_PRECISION_BYTES = 2.0
"""Of a value in the rules that send what they have (DiLoCo, NoLoCo): what these are run with."""


@dataclass
class _UnderWay:
    """Packets that are due at one meeting: steps of every peer, zeros where it sent none."""

    due: int
    steps: Tensor


def amounts(steps: Tensor, factor: float) -> Tensor:
    """steps * factor, rounded once to fp32: what a displacement gives up."""
    return (steps.double() * factor).float()


class Meeting:
    """Packets to everybody. weights: fp32 [P, n], live; start: fp32 [n] on the grid."""

    def __init__(self, row: Row, weights: Tensor, start: Tensor, codec: StackedCodec) -> None:
        self.row, self.weights, self.codec = row, weights, codec
        self.basepoint = torch.round(start.double() / UNIT).int()
        self.ahead = torch.zeros(weights.shape, dtype=torch.int32, device=weights.device)
        self.meetings = 0
        self.payloads_received = 0.0
        """By one peer so far, in bytes per weight."""
        self._under_way: list[_UnderWay] = []
        self._velocity: Tensor | None = None
        self.displacement_rms = 0.0

    # -- what the bench calls ------------------------------------------------------------------------------------------

    def meet(self, publishes: Sequence[bool], shares: Sequence[float], measure: bool = False) -> list[float]:
        """One meeting; factors for the peers' momentum. Raises ValueError if a displacement is not finite."""
        self.meetings += 1
        d = self._captured()
        if measure:
            self.displacement_rms = float(d.square().mean().sqrt() / (self.basepoint.float() * UNIT).square().mean().sqrt())
        self._receive()
        before = None if self._gives_up_more_than_it_adds else self._sum(d)
        self._publish(d, publishes, shares)
        self.weights.copy_(self._sum(d) if before is None else before)
        if self.row.lag == 0:
            self._receive()
            self.weights.copy_(self._sum(d))
        return [self._keep(share) if due else 1.0 for due, share in zip(publishes, shares, strict=True)]

    def settle(self) -> None:
        """Deliver everything that is under way; displacements stay with their peers."""
        for entry in self._under_way:
            entry.due = self.meetings
        d = self._captured()
        self._receive()
        self.weights.copy_(self._sum(d))

    def model(self) -> Tensor:
        """B: fp32 [n]."""
        return self.basepoint.float().mul_(UNIT)

    # -- parts ---------------------------------------------------------------------------------------------------------

    @property
    def _gives_up_more_than_it_adds(self) -> bool:
        return self.row.leak is not None

    def _captured(self) -> Tensor:
        return self.weights - (self.basepoint + self.ahead).float().mul_(UNIT)

    def _sum(self, d: Tensor) -> Tensor:
        return (self.basepoint + self.ahead).float().mul_(UNIT).add_(d)

    def _receive(self) -> None:
        due = [entry for entry in self._under_way if entry.due <= self.meetings]
        self._under_way = [entry for entry in self._under_way if entry.due > self.meetings]
        for entry in due:
            self.ahead -= entry.steps
        if due:
            self._advance(torch.stack([entry.steps.sum(0) for entry in due]).sum(0).int())

    def _advance(self, arrived: Tensor) -> None:
        """B moves by what arrived, or by outer Nesterov momentum over it."""
        row = self.row
        if row.outer_momentum == 0.0 and row.outer_rate == 1.0:
            self.basepoint += arrived
            return
        gain = arrived.float()
        self._velocity = gain if self._velocity is None else self._velocity.mul_(row.outer_momentum).add_(gain)
        self.basepoint += torch.round(row.outer_rate * (row.outer_momentum * self._velocity + gain)).int()

    def _publish(self, d: Tensor, publishes: Sequence[bool], shares: Sequence[float]) -> None:
        steps = self._encoded(d, publishes, shares)
        self.ahead += steps
        late = self.row.late_peers if self.row.late_meetings else 0
        on_time = len(d) - late
        if late:
            tardy = steps.clone()
            tardy[:on_time] = 0
            steps[on_time:] = 0
            self._under_way.append(_UnderWay(self.meetings + self.row.lag + self.row.late_meetings, tardy))
        self._under_way.append(_UnderWay(self.meetings + self.row.lag, steps))
        self.payloads_received += self._received_bytes(sum(publishes), len(d))

    def _received_bytes(self, publishing: int, peers: int) -> float:
        if self.row.kind == "diloco":
            return 2 * HALF_PRECISION_BYTES * (peers - 1) / peers  # a ring: sums come round, then the mean
        return self.codec.bytes_per_value * publishing * (peers - 1) / peers

    def _encoded(self, d: Tensor, publishes: Sequence[bool], shares: Sequence[float]) -> Tensor:
        """c * codec(d) of those that publish; their d gives up its part."""
        coefficients = [
            self._coefficient(peer, share) if due else 0.0 for peer, (due, share) in enumerate(zip(publishes, shares, strict=True))
        ]
        if all(publishes) and len(set(coefficients)) == 1:
            return self._give_up(d, coefficients[0])
        steps = torch.zeros(d.shape, dtype=torch.int32, device=d.device)
        for peer, coefficient in enumerate(coefficients):
            if coefficient:
                steps[peer : peer + 1] = self._give_up(d[peer : peer + 1], coefficient)
        return steps

    def _give_up(self, d: Tensor, coefficient: float) -> Tensor:
        steps = self.codec.encode(d, coefficient)
        leak = coefficient if self.row.leak is None else self.row.leak
        d -= amounts(steps, UNIT / coefficient if leak == 1.0 else UNIT * (leak / coefficient))
        return steps

    def _coefficient(self, peer: int, share: float) -> float:
        is_late = self.row.late_meetings and peer >= len(self.weights) - self.row.late_peers
        stale = 1.0 + self.row.lag + self.row.late_meetings if is_late and self.row.stale_inverse else 1.0
        return min(self.row.scale * share, MOST_COEFFICIENT) / stale

    def _keep(self, share: float) -> float:
        return share if self.row.keep is None else self.row.keep


class CentralMeeting(Meeting):
    """The original's order: pack first, then apply what was packed a meeting ago. A packet is taken out of d when it is applied."""

    def meet(self, publishes: Sequence[bool], shares: Sequence[float], measure: bool = False) -> list[float]:
        self.meetings += 1
        d = self.weights - self.model()
        if measure:
            self.displacement_rms = float(d.square().mean().sqrt() / self.model().square().mean().sqrt())
        steps = torch.cat([self.codec.encode(d[k : k + 1], min(self.row.scale * share, 1.0)) for k, share in enumerate(shares)])
        self._apply()
        self._under_way = [_UnderWay(self.meetings + 1, steps)]
        self.payloads_received += self.codec.bytes_per_value
        return [self._keep(share) for share in shares]

    def settle(self) -> None:
        self._apply()
        self._under_way = []

    def _apply(self) -> None:
        for entry in self._under_way:
            arrived = entry.steps.sum(0).int()
            self.basepoint += arrived
            self.weights += amounts(arrived[None] - entry.steps, UNIT)


class OwnedMeeting(Meeting):
    """Owners of chunks add up and re-encode. All owners' accumulators together are one vector."""

    def __init__(self, row: Row, weights: Tensor, start: Tensor, codec: StackedCodec, owners_codec: StackedCodec) -> None:
        super().__init__(row, weights, start, codec)
        self.owners_codec = owners_codec
        self.accumulator = torch.zeros_like(self.basepoint)
        self._contributed: Tensor | None = None
        self._published: tuple[Tensor, Tensor] | None = None
        """Steps, and the contributions that they list."""

    def _receive(self) -> None:
        if self._published is not None:
            steps, listed = self._published
            self._advance(steps)
            if self.row.credit:
                self.ahead -= listed
        self._published = self._owners_packet()

    def _owners_packet(self) -> tuple[Tensor, Tensor] | None:
        if self._contributed is None:
            return None
        listed, self._contributed = self._contributed, None
        self.accumulator += listed.sum(0).int()
        steps = self.owners_codec.encode(amounts(self.accumulator, UNIT)[None], 1.0)[0]
        self.accumulator -= steps
        return steps, listed

    def _publish(self, d: Tensor, publishes: Sequence[bool], shares: Sequence[float]) -> None:
        steps = self._encoded(d, publishes, shares)
        if self.row.credit:
            self.ahead += steps
        self._contributed = steps
        self.payloads_received += self._received_bytes(sum(publishes), len(d))

    @property
    def _gives_up_more_than_it_adds(self) -> bool:
        return self.row.leak is not None or not self.row.credit

    def _received_bytes(self, publishing: int, peers: int) -> float:
        """The others' contributions to the own chunks, and the other owners' packets."""
        contributions = self.codec.bytes_per_value * publishing * (peers - 1) / peers / peers
        return contributions + self.owners_codec.bytes_per_value * (peers - 1) / peers

    def settle(self) -> None:
        d = self._captured()
        self._receive()
        self._receive()
        self.weights.copy_(self._sum(d))


@dataclass
class _Pairs:
    """Basepoints and outer momentum of every peer."""

    basepoints: Tensor
    velocity: Tensor
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))


class PairMeeting(Meeting):
    """NoLoCo: random pairs. D = mean of both displacements; U = mu U + a D; B = mean of both B + mu U + a D; W = B. Exact, no lag."""

    def __init__(self, row: Row, weights: Tensor, start: Tensor, codec: StackedCodec) -> None:
        super().__init__(row, weights, start, codec)
        self._pairs = _Pairs(start.expand_as(weights).clone(), torch.zeros_like(weights))

    def meet(self, publishes: Sequence[bool], shares: Sequence[float], measure: bool = False) -> list[float]:
        self.meetings += 1
        state, row = self._pairs, self.row
        partner = self._partners(len(self.weights))
        d = self.weights - state.basepoints
        if measure:
            self.displacement_rms = float(d.square().mean().sqrt() / state.basepoints.square().mean().sqrt())
        mean = (d + d[partner]) / 2
        state.velocity.mul_(row.outer_momentum).add_(mean, alpha=row.outer_rate)
        moved = row.outer_momentum * state.velocity + row.outer_rate * mean
        state.basepoints = (state.basepoints + state.basepoints[partner]) / 2 + moved
        self.weights.copy_(state.basepoints)
        self.payloads_received += 2 * HALF_PRECISION_BYTES  # displacement and basepoint of one partner
        return [self._keep(share) for share in shares]

    def settle(self) -> None:
        """Nothing is under way."""

    def model(self) -> Tensor:
        """The mean of all basepoints."""
        return self._pairs.basepoints.mean(0)

    def _partners(self, peers: int) -> Tensor:
        """Each peer's partner; with an odd number one stays alone."""
        order = torch.randperm(peers, generator=self._pairs.generator)
        partner = torch.arange(peers)
        for at in range(0, peers - 1, 2):
            partner[order[at]], partner[order[at + 1]] = order[at + 1].clone(), order[at].clone()
        return partner.to(self.weights.device)
