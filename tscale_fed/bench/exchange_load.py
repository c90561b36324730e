"""What a peer is busy with while it exchanges: steps that take a given time, packets that come at a given rate.

Enters: the length of a step; bodies of real packets. Leaves: a load for the device; packets, opened, verified and uploaded as a peer does
it, offered to the meetings at an even rate by a thread of their own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import msgspec
import torch

from tscale_fed.engine.passes import capture
from tscale_net.identity import Identity, verify
from tscale_net.ports import SystemClock
from tscale_peers.basepoint import Replica
from tscale_peers.exchange import Exchange, OuterRule
from tscale_peers.layout import Layout
from tscale_peers.meeting import MeetingPoint
from tscale_peers.packet import PACKET_VERSION, SIGNATURE_BYTES, Header, Key, Packet, Terms
from tscale_peers.packet_log import PacketLog

_PRODUCT_SIDE = {"cuda": 4096, "cpu": 128}
"""Matrices of the load: they fill the device, and one product is short beside a step."""
_CALIBRATION_S = 0.3
_WEIGHT_SIZE, _MOVE_SIZE = 0.02, 1e-3
"""Typical sizes of weights, and of what a peer learns between publications."""


class Step:
    """Matrix products that keep the device busy for `seconds`, and wait for it at the end as a training step does."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        side = _PRODUCT_SIDE[device.type]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._device = device
        self._a, self._out = torch.randn(side, side, dtype=dtype, device=device), torch.empty(side, side, dtype=dtype, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._timed(lambda: self._launch(8))
        count, taken = 8, 0.0
        while taken < _CALIBRATION_S:
            count *= 2
            taken = self._timed(lambda: self._launch(count))  # noqa: B023
        self._products = max(1, round(seconds / taken * count))
        if device.type == "cuda":
            self._graph = capture(lambda: self._launch(self._products))
        self.seconds = min(self._timed(self._replay) for _ in range(3))
        """What a step really takes where nothing else runs."""

    def run(self) -> None:
        self._timed(self._replay)

    def _replay(self) -> None:
        """One launch on a GPU, as the engine's steps are."""
        if self._graph is None:
            self._launch(self._products)
        else:
            self._graph.replay()

    def _launch(self, products: int) -> None:
        for _ in range(products):
            torch.mm(self._a, self._a, out=self._out)

    def _timed(self, work: Callable[[], None]) -> float:
        begun = time.perf_counter()
        work()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter() - begun


def new_exchange(terms: Terms, weights_on: torch.device, device: torch.device, log: PacketLog, helper: Executor | None) -> Exchange:
    """A peer's exchange around random weights on `weights_on`, the basepoint on `device`."""
    identity = Identity.from_seed(bytes([1]) * 32)
    weights = torch.empty(terms.layout.size, device=weights_on).normal_(std=_WEIGHT_SIZE)
    replica = Replica(terms.layout, terms.codec, device=device)
    replica.set_start(weights)
    return Exchange(
        replica, weights, OuterRule(), (identity.public_key, identity.sign), 1, log, terms, SystemClock(),
        keep_displacement=device.type == "cpu", helper=helper,
    )  # fmt: skip


def other_authors_bodies(terms: Terms, device: torch.device) -> list[bytes]:
    """One packet of another author for each chunk, signed."""
    identity = Identity.from_seed(bytes([2]) * 32)
    bodies = []
    for chunk in terms.layout.chunks:
        codec = terms.codec_of(chunk)
        d = torch.empty(chunk.size, device=device).normal_(std=_MOVE_SIZE)
        header = Header(PACKET_VERSION, terms.run, identity.public_key, 1, 1, chunk.index, 1, 1 / 16, codec.name, time.time())
        bodies.append(Packet.seal(header, codec.encode(d, chunk, header.coefficient), identity.sign))
    return bodies


class Arrivals:
    """Packets of others, at an even rate, the chunks in turn; each is opened and verified as the first of its chunk was, and is new."""

    def __init__(self, bodies: Sequence[bytes], terms: Terms, exchange: Exchange) -> None:
        self.opened = 0
        """How many were offered so far."""
        self.busy_s = 0.0
        """Time that opening, verifying and uploading took."""
        self._bodies = bodies
        self._terms = terms
        self._exchange = exchange
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, meeting: MeetingPoint, per_s: float) -> None:
        self._thread = threading.Thread(target=self._run, args=(meeting, per_s), name="arrivals", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def get(self, key: Key) -> bytes | None:
        """The log's part: what a meeting reads back where memory did not take it. The signature was checked before."""
        packet = self._numbered(Packet.decode(self._bodies[key[2]], self._terms), key[1])
        return Packet.seal(packet.header, self._payload(key[2]), lambda domain, message: bytes(SIGNATURE_BYTES))

    def holds(self, key: Key) -> bool:
        """Everything can be read back."""
        return True

    def packet(self, number: int) -> tuple[Packet, int]:
        """The number-th packet that comes, checked and uploaded, and its bytes."""
        body = self._bodies[number % len(self._bodies)]
        opened = self._numbered(Packet.open(body, self._terms, verify), 1 + number // len(self._bodies))
        return self._exchange.prepared(opened), len(body)

    def _run(self, meeting: MeetingPoint, per_s: float) -> None:
        started, first = time.perf_counter(), self.opened
        while not self._stop.is_set():
            due = started + (self.opened - first) / per_s
            now = time.perf_counter()
            if now < due:
                self._stop.wait(due - now)
                continue
            packet, nbytes = self.packet(self.opened)
            self.busy_s += time.perf_counter() - now
            self.opened += 1
            meeting.offer(packet.key, packet, nbytes)

    def _numbered(self, packet: Packet, seq: int) -> Packet:
        return Packet(msgspec.structs.replace(packet.header, seq=seq), packet.delta)

    def _payload(self, chunk: int) -> bytes:
        body = self._bodies[chunk]
        return body[2 + int.from_bytes(body[:2], "little") : -SIGNATURE_BYTES]


def layout_bytes(layout: Layout, bodies: Sequence[bytes]) -> float:
    """Bytes per weight of one publication."""
    return sum(map(len, bodies)) / layout.size
