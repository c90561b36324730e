"""One snapshot of a running peer. Screen, `tscale-status --json`, log line and tests all read this one struct.

Enters: the running peer fills it about once a second. Leaves: JSON through `encode`/`decode` (strict: unknown fields are an error,
so that screen and peer of different versions say so instead of showing nonsense). Units stand in the field names; a number that is
not known yet is None, never 0. Hashes and digests are lower-case hex.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Literal

import msgspec

from tscale_fed.limits import EVENT_CHARACTERS, LOSS_POINTS, RECENT_STATES, STATUS_EVENTS
from tscale_fed.units import plain

Phase = Literal["joining", "training", "paused", "leaving"]
PeerState = Literal["live", "suspect", "dead", "left", "banned"]


class RecentState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What had been applied, and the basepoint's hash at that moment. Two peers that share a digest must share the hash."""

    applied_digest: str
    basepoint_hash: str


class PeerRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Another peer, as this one sees it."""

    id: str
    name: str
    path: str = ""
    """How packets reach it: direct, gossip (known through others), relay."""
    state: PeerState = "live"
    rtt_ms: float | None = None
    share: float | None = None
    """Its part of the swarm's batch rate, 0..1."""
    lag: int | None = None
    """Batches that our basepoint contains and its basepoint, by its newest record, does not."""
    last_delta_s: float | None = None
    """Seconds since its last delta was applied here."""
    tokens_per_s: float | None = None
    address: str = ""


class Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Traffic since start."""

    up_bytes: int = 0
    down_bytes: int = 0
    bytes_per_param: float | None = None
    """Bytes of one complete own delta, packets and signatures included, per model parameter."""
    up_bytes_per_s: float | None = None
    down_bytes_per_s: float | None = None
    deltas_sent: int = 0
    deltas_applied: int = 0


class Spread(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How own work reaches the others."""

    by_owners: bool = False
    """Contributions to the owners of chunks; otherwise packets to everybody."""
    owned_chunks: int = 0
    """Chunks whose contributions this peer sums."""
    waiting: int = 0
    """Own contributions that no sum lists yet."""
    confirmed: int = 0
    taken_back: int = 0
    """Not listed in time, or given to an owner that is gone; they are given again as part of what is left."""
    summed: int = 0
    """Contributions of others, and own ones, that this peer has summed."""
    passed_on: int = 0


class ExchangeTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Part of the time in which the device waits for the exchange with the swarm, 0..1, by cause."""

    receive: float
    """Packets of others are added to basepoint and weights."""
    publish: float
    """The displacement is captured, own packets are taken up."""
    hash: float
    """The state is read."""
    wait: float
    """For the device, and for other threads."""


class Transfer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A running download."""

    what: str
    done_bytes: int
    total_bytes: int
    sources: int = 1


class LossPoint(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One point of the curve: own step, own training loss, held-out loss of the basepoint (nats per token)."""

    step: int
    train: float | None = None
    swarm: float | None = None


class EventLine(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Something worth a line: Unix time, one sentence."""

    unix_s: float
    text: str


class Status(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Everything that may be shown of a running peer."""

    version: str
    run: str
    """Hash of the run manifest (hex): the name of the run for machines."""
    run_name: str = ""
    peer: str
    """Peer id (12D3KooW...)."""
    name: str
    role: Literal["peer", "seed"]
    phase: Phase
    uptime_s: float
    device: str = ""
    reach: str = ""
    """One sentence: how others can reach this peer."""
    addresses: list[str] = []
    step: int = 0
    """Own optimizer steps."""
    tokens: int = 0
    """Tokens this peer has trained on."""
    swarm_tokens: int | None = None
    swarm_batches: int | None = None
    budget_batches: int | None = None
    train_loss: float | None = None
    swarm_loss: float | None = None
    """Held-out loss of the basepoint, nats per token: the newest that anybody measured."""
    swarm_loss_batches: int | None = None
    """Batches of the swarm in the basepoint that was measured."""
    swarm_loss_by: str = ""
    """Who measured it; empty: this peer."""
    average_loss: float | None = None
    """The same of the running average of the basepoint."""
    best_loss: float | None = None
    """Lowest that this peer measured; those weights lie in its home under `best`."""
    basepoint_hash: str = ""
    applied_digest: str = ""
    recent: list[RecentState] = []
    agreeing_peers: int | None = None
    """Peers whose (digest, hash) pairs were compared with ours and agree; None if none could be compared yet."""
    compared_peers: int | None = None
    busy_fraction: float | None = None
    """Part of the time in which the device computes gradients, 0..1."""
    exchange_fraction: float | None = None
    """Part of the time in which it waits for the exchange with the swarm, 0..1."""
    exchange: ExchangeTime | None = None
    """The same by cause."""
    tokens_per_s: float | None = None
    swarm_tokens_per_s: float | None = None
    rate: float | None = None
    """Learning rate of the last step."""
    share: float | None = None
    displacement: float | None = None
    """Norm of W - B over the norm of B: work that the swarm does not have yet."""
    steps_since_publish: int | None = None
    publish_every_steps: int | None = None
    publish_interval_s: float | None = None
    """Shortest time between own publications that the swarm's links allow; 0: they ask for nothing."""
    publish_reason: str = ""
    """Which link sets it, for people."""
    down_capacity_bytes_per_s: float | None = None
    """What this peer's connection receives at most, as far as it is known."""
    up_capacity_bytes_per_s: float | None = None
    peers: list[PeerRow] = []
    wire: Wire = Wire()
    spread: Spread = Spread()
    refused: dict[str, int] = {}
    """Reason code -> how often something was turned away."""
    transfer: Transfer | None = None
    losses: list[LossPoint] = []
    events: list[EventLine] = []


_DECODER = msgspec.json.Decoder(Status)


def encode(status: Status) -> bytes:
    """One line of JSON. Non-finite numbers become null."""
    return msgspec.json.encode(status)


def decode(data: bytes) -> Status:
    """The inverse. Raises msgspec.ValidationError or DecodeError if it is not a snapshot of this version."""
    return _DECODER.decode(data)


def finite(value: float | None) -> float | None:
    """`value`, or None where it is not a finite number (a loss that has become NaN is shown as unknown)."""
    return value if value is not None and math.isfinite(value) else None


class LossHistory:
    """A loss curve of bounded length that covers the whole run: when full, every second point is dropped and the stride doubles.

    Training losses may be added as often as one likes; held-out losses come rarely, so that of a dropped point moves to the next one kept.
    """

    def __init__(self, longest: int = LOSS_POINTS) -> None:
        self._longest = longest + longest % 2
        self._points: list[LossPoint] = []
        self._stride = 1
        self._skipped = 0
        self._newest: LossPoint | None = None
        """The last point added, if it is not among the kept ones."""
        self._swarm: float | None = None

    def add(self, step: int, train: float | None, swarm: float | None) -> None:
        """Record one point; steps may repeat or fall (a resumed peer)."""
        known = finite(swarm)
        self._swarm = self._swarm if known is None else known
        point = LossPoint(step, finite(train), self._swarm)
        self._skipped += 1
        if self._skipped < self._stride:
            self._newest = point
            return
        self._skipped, self._newest, self._swarm = 0, None, None
        self._points.append(point)
        if len(self._points) == self._longest:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [LossPoint(kept.step, kept.train, lost.swarm if kept.swarm is None else kept.swarm) for lost, kept in pairs]
            self._stride *= 2

    def points(self) -> list[LossPoint]:
        """The kept points, oldest first, and always the newest one."""
        return list(self._points) if self._newest is None else [*self._points, self._newest]


class EventHistory:
    """The last events, cut to one safe line each."""

    def __init__(self, longest: int = STATUS_EVENTS) -> None:
        self._lines: deque[EventLine] = deque(maxlen=longest)

    def add(self, unix_s: float, text: str) -> None:
        self._lines.append(EventLine(unix_s, plain(text, EVENT_CHARACTERS)))

    def lines(self) -> list[EventLine]:
        """Oldest first."""
        return list(self._lines)


def recent_states(pairs: list[tuple[bytes, bytes]]) -> list[RecentState]:
    """(digest, hash) pairs as the snapshot shows them: hex, the last `RECENT_STATES`."""
    return [RecentState(digest.hex(), value.hex()) for digest, value in pairs[-RECENT_STATES:]]
