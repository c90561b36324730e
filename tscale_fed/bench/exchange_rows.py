"""The two rows of `bench exchange`: meetings beside steps with the basepoint on the device, and everything at once on the host.

Enters: a setting. Leaves: what one interval between publications costs, by cause.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from tscale_fed.bench.exchange_load import Arrivals, Step, layout_bytes, new_exchange, other_authors_bodies
from tscale_fed.model.shape import ModelShape
from tscale_fed.new_run import tensor_specs, usual_chunk
from tscale_net.ports import SystemClock
from tscale_peers import limits
from tscale_peers.codec import codec_named
from tscale_peers.layout import Layout
from tscale_peers.meeting import MeetingPoint, Progress
from tscale_peers.meeting_time import Seconds
from tscale_peers.packet import Packet, Terms
from tscale_peers.packet_log import MemoryLog

Say = Callable[[str], None]
OWNERS_PAYLOADS = 2.0
"""Packets per chunk and interval where owners of chunks sum up: the sum itself, and for its own chunks each owner all contributions."""
SAMPLE_VALUES = 1 << 25
"""Of the model, for the baseline."""
RUN = bytes(32)


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    terms: Terms
    device: torch.device
    peers: int
    payloads: float
    interval_s: float
    step_s: float

    @staticmethod
    def of(shape: ModelShape, arguments: argparse.Namespace) -> Setting:
        """Raises Refused for a codec or layout that cannot be."""
        codec = codec_named(arguments.codec)
        specs = tensor_specs(shape)
        layout = Layout.build(specs, arguments.chunk_params or usual_chunk(sum(spec.size for spec in specs)))
        by_owners = arguments.peers >= limits.owners_from_peers
        payloads = arguments.payloads or (OWNERS_PAYLOADS if by_owners else float(max(1, arguments.peers - 1)))
        terms = Terms(RUN, layout, codec)
        return Setting(terms, torch.device(arguments.device), arguments.peers, payloads, arguments.interval, arguments.step_ms / 1e3)

    @property
    def packets_per_s(self) -> float:
        return self.payloads * len(self.terms.layout.chunks) / self.interval_s

    def text(self) -> str:
        size, chunks = self.terms.layout.size / 1e9, len(self.terms.layout.chunks)
        model = f"{size:.3f}e9 weights in {chunks} chunks, codec {self.terms.codec.name}"
        swarm = f"{self.peers} peers, {self.payloads:g} packets per chunk every {self.interval_s:g} s"
        return f"{model}, {swarm}, steps of {self.step_s * 1e3:.0f} ms"

    def values(self) -> dict[str, Any]:
        layout = self.terms.layout
        return {
            "weights": layout.size, "chunks": len(layout.chunks), "codec": self.terms.codec.name, "peers": self.peers,
            "payloads": self.payloads, "interval_s": self.interval_s, "step_ms": self.step_s * 1e3,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """One row; times of one interval."""

    name: str
    meetings: Seconds
    drag_s: float
    """By how much the steps of an interval took longer than alone: what ran beside them."""
    seconds: float
    """Measured for so long."""
    interval_s: float
    remark: str

    @property
    def lost_s(self) -> float:
        """Not trained."""
        return self.meetings.total + self.drag_s

    @property
    def busy(self) -> float:
        """At the interval that was measured."""
        return max(0.0, 1 - self.lost_s / self.interval_s)

    def values(self) -> dict[str, Any]:
        causes = {f"{name}_s": value for name, value in self.meetings._asdict().items()}
        return {"name": self.name, **causes, "drag_s": self.drag_s, "busy": self.busy, "measured_s": self.seconds, "remark": self.remark}


def measure_beside(setting: Setting, say: Say) -> Measured:
    """One interval with the basepoint on the device: steps, meetings after each, one publication, packets all the time."""
    terms, device = setting.terms, setting.device
    step = Step(device, setting.step_s)
    taken = _device_bytes(device)
    say(f"a step alone: {step.seconds * 1e3:.1f} ms")
    bodies = other_authors_bodies(terms, device)
    say(f"packets: {layout_bytes(terms.layout, bodies):.4f} bytes per weight")
    with ThreadPoolExecutor(1, "exchange") as helper:
        exchange = new_exchange(terms, device, device, MemoryLog(2), helper)
        arrivals = Arrivals(bodies, terms, exchange)
        every = max(1, round(setting.interval_s / step.seconds))
        meeting = MeetingPoint(exchange, exchange.replica, arrivals, every, SystemClock(), lambda body: Packet.decode(body, terms), helper)
        meeting.may_publish = True
        meeting.share = 1 / setting.peers
        _warm_up(exchange, arrivals, meeting, step)
        say("warm")
        # The publication falls due at a fourth of the interval, so that all of it is within.
        meeting.resume_at(Progress(-(every - max(1, every // 4)), 0, 0, 0.0, trained=False))
        first = arrivals.opened
        arrivals.start(meeting, setting.packets_per_s)
        before, steps, published, applied = meeting.time.spent, 0, 0, 0
        begun = time.perf_counter()
        while steps < every or (published == 0 and steps < 2 * every):
            step.run()
            steps += 1
            met = meeting.meet(Progress(steps, steps, steps, 0.0, trained=True))
            published += len(met.published)
            applied += len(met.receipts)
        wall = time.perf_counter() - begun
        arrivals.stop()
        spent = meeting.time.spent.since(before)
        meeting.finish_outgoing()
        per_weight = (_device_bytes(device) - taken) / terms.layout.size
    intervals = steps / every
    wanted = round(setting.packets_per_s * wall)
    packets = f"{published} packets published; of {wanted} due {arrivals.opened - first} were opened and {applied} applied"
    remark = f"{packets}; opening took {arrivals.busy_s / wall:.0%} of a core"
    remark += f"; {per_weight:.1f} bytes of the device per weight at most, 4 of them the weights" if device.type == "cuda" else ""
    say(remark)
    drag = max(0.0, wall - steps * step.seconds - spent.total)
    scaled = Seconds(*(value / intervals for value in spent))
    return Measured(f"basepoint on {device.type}, beside training", scaled, drag / intervals, wall, every * step.seconds, remark)


def measure_baseline(setting: Setting, say: Say) -> Measured:
    """Basepoint and displacement on the host, weights on the device, nothing beside training; a sample of the model, scaled up."""
    whole = setting.terms.layout
    specs, size = [], 0
    for spec in whole.specs:
        specs.append(spec)
        size += spec.size
        if size >= min(SAMPLE_VALUES, whole.size):
            break
    layout = Layout.build(specs, max(chunk.size for chunk in whole.chunks))
    terms = Terms(RUN, layout, setting.terms.codec)
    scale = whole.size / layout.size
    exchange = new_exchange(terms, setting.device, torch.device("cpu"), MemoryLog(2), None)
    arrivals = Arrivals(other_authors_bodies(terms, torch.device("cpu")), terms, exchange)
    packets = [arrivals.packet(number)[0] for number in range(max(1, round(setting.payloads * len(layout.chunks))))]

    def timed(work: Callable[[], object]) -> float:
        begun = time.perf_counter()
        work()
        exchange.wait()
        return (time.perf_counter() - begun) * scale

    exchange.publish(1, 1 / setting.peers)
    exchange.weights.add_(1e-4)
    exchange.mark_trained()
    receive = timed(lambda: exchange.receive(packets))
    exchange.mark_trained()
    publish = timed(lambda: exchange.publish(2, 1 / setting.peers))
    hashed = timed(exchange.replica.state)
    remark = f"measured on {layout.size / 1e6:.0f} million weights, times {scale:.1f}"
    say(f"baseline: {remark}")
    return Measured("basepoint on the host, in meetings", Seconds(receive, publish, hashed), 0.0, 0.0, setting.interval_s, remark)


def _device_bytes(device: torch.device) -> int:
    """The most that tensors took so far; 0 on a processor."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _warm_up(exchange: Any, arrivals: Arrivals, meeting: MeetingPoint, step: Step) -> None:
    """Everything once: kernels are compiled, memory is taken."""
    for number in range(2):
        packet, nbytes = arrivals.packet(number * len(exchange.terms.layout.chunks))
        meeting.offer(packet.key, packet, nbytes)
    arrivals.opened = 2 * len(exchange.terms.layout.chunks)
    exchange.mark_trained()
    meeting.resume_at(Progress(-meeting.publish_every_steps, 0, 0, 0.0, trained=False))
    met = meeting.meet(Progress(0, 0, 0, 0.0, trained=True))
    while not met.published and met.withheld is None:
        step.run()
        met = meeting.meet(Progress(0, 0, 0, 0.0, trained=True))
    meeting.settle()
