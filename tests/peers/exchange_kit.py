"""For tests of the exchange beside training: a helper thread that works when it is told to, and random histories of one exchange."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import torch

from tests.peers.core_kit import STREAM, StillClock, author, new_replica, opened
from tscale_peers.basepoint import Replica
from tscale_peers.delta_log import MemoryLog, PacketLog
from tscale_peers.exchange import Exchange, OuterRule
from tscale_peers.packet import Packet, Terms


class ManualHelper(Executor):
    """Work waits until `work` is called; the caller's thread does it."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:  # type: ignore[override]
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: function(*args, **kwargs)))
        return future

    def work(self) -> None:
        """Everything that waits."""
        while self.waiting:
            future, call = self.waiting.popleft()
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)


def exchange_on(
    number: int,
    t: Terms,
    *,
    rule: OuterRule | None = None,
    device: str = "cpu",
    keep: bool = True,
    helper: Executor | None = None,
    log: PacketLog | None = None,
) -> Exchange:
    """A newcomer with weights, replica and displacement on `device`."""
    who = author(number)
    replica = Replica(t.layout, t.codec, device=device)
    replica.set_start(new_replica(t).weights())
    weights = torch.empty(t.layout.size, device=device)
    return Exchange(
        replica, weights, rule or OuterRule(), (who.public_key, who.sign), STREAM, log or MemoryLog(), t, StillClock(),
        keep_displacement=keep, helper=helper,
    )  # fmt: skip


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.detach().cpu().clone().view(torch.int32)


def train(exchange: Exchange, seed: int, size: float = 1e-3) -> None:
    """One local move, the same on every device."""
    move = torch.randn(exchange.weights.shape, generator=torch.Generator().manual_seed(seed)) * size
    exchange.weights.add_(move.to(exchange.weights.device))
    exchange.mark_trained()


class History:
    """Random events, the same for every exchange that plays it: training, packets of two others, own publications, snapshot chunks."""

    def __init__(self, t: Terms, seed: int, events: int) -> None:
        self._t = t
        self._others = [exchange_on(number, t) for number in (8, 9)]
        rng = random.Random(seed)
        bodies: list[bytes] = []
        self.events: list[tuple[str, Any]] = []
        for number in range(events):
            other = rng.choice(self._others)
            train(other, 1000 + number)
            bodies += other.publish(number, 0.5).packets
            kind = rng.choice(["train", "receive", "receive", "publish", "load"])
            if kind == "train":
                self.events.append((kind, number))
            elif kind == "receive":
                self.events.append((kind, rng.choices(bodies, k=rng.randrange(1, 12))))
            elif kind == "publish":
                self.events.append((kind, rng.choice([0.1, 0.5, 1.0])))
            else:
                index = rng.randrange(len(t.layout.chunks))
                self.events.append((kind, (index, other.replica.read_chunk(index))))

    def play(self, exchange: Exchange, after: Callable[[int], None] = lambda event: None) -> list[bytes]:
        """All events; returns what was published."""
        published: list[bytes] = []
        for number, (kind, value) in enumerate(self.events):
            if kind == "train":
                train(exchange, value)
            elif kind == "receive":
                exchange.receive(prepared(exchange, opened(value, self._t)))
            elif kind == "publish":
                train(exchange, 500 + number)
                published += exchange.publish(number, value).packets
            else:
                exchange.load_chunks({value[0]: value[1]})
            after(number)
        return published


def prepared(exchange: Exchange, packets: list[Packet]) -> list[Packet]:
    return [exchange.prepared(packet) for packet in packets]
