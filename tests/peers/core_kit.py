"""Small runs for the tests of the algebra: a layout with several chunks, authors with real keys, exchanges that meet directly."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tscale_net.identity import Identity, verify
from tscale_peers.basepoint import Replica
from tscale_peers.codec import Codec, codec_named
from tscale_peers.delta_log import MemoryLog, PacketLog
from tscale_peers.exchange import Exchange, OuterRule
from tscale_peers.layout import Layout, TensorSpec
from tscale_peers.packet import PACKET_VERSION, Header, Packet, Terms, stream_key

torch.set_num_threads(1)

RUN = b"run-of-the-tests" * 2
STREAM = 7
SPECS = (TensorSpec("wide", 6, 64, -20), TensorSpec("small", 2, 16, -18), TensorSpec("tall", 20, 32, -22))
LAYOUT = Layout.build(SPECS, 512)


class StillClock:
    """A wall clock that stands still: packets made twice are equal."""

    def now(self) -> float:
        return 0.0

    def wall(self) -> float:
        return 1_700_000_000.0

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing here may sleep")


def terms(codec: str | Codec = "sign", max_coefficient: float = 1.0, layout: Layout = LAYOUT) -> Terms:
    return Terms(RUN, layout, codec_named(codec) if isinstance(codec, str) else codec, max_coefficient)


def author(number: int) -> Identity:
    return Identity.from_seed(bytes([number]) * 32)


def start_weights(layout: Layout = LAYOUT, seed: int = 0) -> torch.Tensor:
    return torch.randn(layout.size, generator=torch.Generator().manual_seed(seed)) * 0.05


def new_replica(t: Terms) -> Replica:
    replica = Replica(t.layout, t.codec)
    replica.set_start(start_weights(t.layout))
    return replica


def new_exchange(
    number: int,
    rule: OuterRule = OuterRule(),  # noqa: B008 (frozen)
    t: Terms | None = None,
    log: PacketLog | None = None,
    dtype: torch.dtype = torch.float32,
) -> Exchange:
    t = t or terms()
    who = author(number)
    weights = torch.empty(t.layout.size, dtype=dtype)
    return Exchange(new_replica(t), weights, rule, (who.public_key, who.sign), STREAM, log or MemoryLog(), t, StillClock())


@dataclass
class Trainer:
    """Scripted local moves of one exchange, from its own generator."""

    exchange: Exchange
    seed: int

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def train(self, size: float = 1e-3) -> torch.Tensor:
        w = self.exchange.weights
        move = torch.randn(w.shape, generator=self._generator, dtype=torch.float64).to(w.dtype) * size
        w.add_(move)
        self.exchange.mark_trained()
        return move


def opened(bodies: list[bytes], t: Terms | None = None) -> list[Packet]:
    return [Packet.open(body, t or terms(), verify) for body in bodies]


def header(number: int = 1, **changes: object) -> Header:
    """A header that passes every check, with `changes`."""
    fields: dict[str, object] = {
        "version": PACKET_VERSION,
        "run": RUN,
        "author": author(number).public_key,
        "stream": STREAM,
        "seq": 1,
        "chunk": 0,
        "batches_total": 3,
        "coefficient": 0.5,
        "codec": "sign",
        "created_unix": 1_700_000_000.0,
    }
    return Header(**{**fields, **changes})  # type: ignore[arg-type]


def sealed(payload: bytes, number: int = 1, **changes: object) -> bytes:
    return Packet.seal(header(number, **changes), payload, author(number).sign)


def payload_for(chunk: int, seed: int = 0, coefficient: float = 0.5, t: Terms | None = None) -> bytes:
    t = t or terms()
    where = t.layout.chunks[chunk]
    d = torch.randn(where.size, generator=torch.Generator().manual_seed(seed)) * 1e-3
    return t.codec.encode(d, where, coefficient)


def key_of(number: int) -> bytes:
    return stream_key(author(number).public_key, STREAM)
