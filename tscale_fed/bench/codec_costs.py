"""One codec measured: bytes with everything that travels, nanoseconds per parameter, and what it leaves of a displacement.

Enters: the name of a codec, a model of one matrix on a device. Leaves: its `Costs`. Everything goes through the classes that production
runs; times are the shortest of several, since the machine may be shared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tscale_net.limits import BULK_BODY_BYTES
from tscale_peers.codec import Codec, CodecMemory, Delta, codec_named
from tscale_peers.layout import Layout, TensorSpec
from tscale_peers.packet import PACKET_VERSION, SIGNATURE_BYTES, Header, Packet, Terms

COEFFICIENT = 0.125
"""An equal share of 8 peers."""
UNIT_EXPONENT = -22
"""As runs have it (tscale_fed.new_run)."""
MOVED = 1e-3
"""Size of the displacement."""
REPEATS = 5
CHUNK_PARAMS = tuple(1 << power for power in range(20, 13, -1))
"""Values in a chunk: the run's default, or the largest below it whose packets fit in a message."""
LONG_RUN = 1_000_000
"""Numbers in the header are those of a run that has published so often."""


@dataclass(frozen=True, slots=True)
class Costs:
    """bytes_per_parameter with header and signature; ns per parameter; parts of ||d||^2 that are left (at c = 1/8, nothing else lost)."""

    bytes_per_parameter: float
    payload_bytes_per_parameter: float
    chunk_params: int
    encode_ns: float
    open_ns: float
    apply_ns: float
    leak_ns: float
    left_gaussian: float
    left_heavy: float

    def values(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class Subject:
    """One matrix, its displacement, and a basepoint."""

    def __init__(self, parameters: int, columns: int, device: torch.device) -> None:
        self.columns, self.device = columns, device
        self.rows = max(1, parameters // columns)
        self.parameters = self.rows * columns
        generator = torch.Generator(device=device).manual_seed(1)
        self.gaussian = torch.randn(self.parameters, generator=generator, device=device).mul_(MOVED)
        self.heavy = torch.randn(self.parameters, generator=generator, device=device).exp_().mul_(self.gaussian)
        self.basepoint = torch.zeros(self.parameters, dtype=torch.int32, device=device)

    def layout(self, codec: Codec) -> Layout:
        """Cut for a codec. Raises Refused("bad-layout") if a row does not fit in a chunk."""
        spec = TensorSpec("matrix", self.rows, self.columns, UNIT_EXPONENT)
        for chunk_params in CHUNK_PARAMS:
            layout = Layout.build([spec], max(self.columns, chunk_params))
            if Terms(bytes(32), layout, codec).max_packet_bytes <= BULK_BODY_BYTES:
                break
        return layout

    def best_ns(self, work: Callable[[], object]) -> float:
        """Nanoseconds per parameter of the fastest of several runs, after one that is not counted."""
        times = []
        for _ in range(REPEATS + 1):
            self._wait()
            start = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - start)
        return min(times[1:]) / self.parameters * 1e9

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def addition_ns(subject: Subject) -> float:
    """torch's own W += d in fp32, over the same values."""
    weights = subject.gaussian.clone()
    return subject.best_ns(lambda: weights.add_(subject.gaussian))


def costs_of(name: str, subject: Subject) -> Costs:
    """Measure one codec. Raises Refused("packet-codec") for an unknown one."""
    codec = codec_named(name)
    layout = subject.layout(codec)
    memories = [CodecMemory() for _ in layout.chunks]
    payloads: list[bytes] = []
    deltas: list[Delta] = []

    def encode(d: Tensor) -> None:
        payloads[:] = [codec.encode(c.of(d), c, COEFFICIENT, memory) for c, memory in zip(layout.chunks, memories, strict=True)]

    def open_all() -> None:
        deltas[:] = [codec.open(payload, c) for c, payload in zip(layout.chunks, payloads, strict=True)]

    def apply() -> None:
        for c, delta in zip(layout.chunks, deltas, strict=True):
            delta.add_to(c.of(subject.basepoint))

    def leak(d: Tensor) -> None:
        for c, delta in zip(layout.chunks, deltas, strict=True):
            delta.take_from(c.of(d), COEFFICIENT)

    def left_of(d: Tensor) -> float:
        encode(d)
        open_all()
        left = d.clone()
        leak(left)
        return float((left.double().square().sum() / d.double().square().sum()).item())

    left_heavy, left_gaussian = left_of(subject.heavy), left_of(subject.gaussian)
    encode_ns = subject.best_ns(lambda: encode(subject.gaussian))
    open_ns, apply_ns = subject.best_ns(open_all), subject.best_ns(apply)
    target = subject.gaussian.clone()
    leak_ns = subject.best_ns(lambda: leak(target))
    payload = sum(len(payload) for payload in payloads)
    wire = payload + sum(_framing_bytes(codec.name, chunk.index) for chunk in layout.chunks)
    return Costs(
        bytes_per_parameter=wire / subject.parameters,
        payload_bytes_per_parameter=payload / subject.parameters,
        chunk_params=layout.chunks[0].size,
        encode_ns=encode_ns,
        open_ns=open_ns,
        apply_ns=apply_ns,
        leak_ns=leak_ns,
        left_gaussian=left_gaussian,
        left_heavy=left_heavy,
    )


def _framing_bytes(codec: str, chunk: int) -> int:
    """Header and signature of a packet that everybody applies, late in a long run."""
    header = Header(
        version=PACKET_VERSION,
        run=bytes(32),
        author=bytes(32),
        stream=(1 << 63) - 1,
        seq=LONG_RUN,
        chunk=chunk,
        batches_total=LONG_RUN,
        coefficient=COEFFICIENT,
        codec=codec,
        created_unix=1.7e9,
    )
    return len(Packet.seal(header, b"", lambda domain, message: bytes(SIGNATURE_BYTES)))
