"""Would compressing payloads once more gain anything? Payloads of real training, through the usual compressors.

Enters: the name of a codec, a number of steps. Leaves: what each compressor takes off. Two peers train the demo's model on its text and
exchange through the production classes; codecs that send a part of the values use the averaging rule, the others the sum rule. Payloads of
the first half, when the weights have hardly moved, are left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lz4.block
from torch import Tensor

from tscale_fed.assembly import build_trainer, prepare_data
from tscale_fed.bench.in_process_swarm import Member
from tscale_fed.config import BatchSection, DataSection, OptimizerSection, RunConfig, RunSection, SwarmSection
from tscale_fed.data.token_data import TokenData
from tscale_fed.device import choose_device
from tscale_fed.new_run import create_run
from tscale_net.ports import SystemClock
from tscale_peers.assembly import RunTerms
from tscale_peers.packet import SIGNATURE_BYTES

PEERS = 2
EVERY_STEPS = 5
RATE = 0.02
CHUNK_PARAMS = 1 << 16
"""Packets of every codec fit in a message then; several times the window of lz4."""
ZSTD_LEVEL = 19
DEFLATE_LEVEL = 9


def _compressors() -> dict[str, Callable[[bytes], bytes]]:
    known: dict[str, Callable[[bytes], bytes]] = {
        "lz4": lambda data: lz4.block.compress(data, store_size=False),
        "lz4 slow": lambda data: lz4.block.compress(data, mode="high_compression", compression=12, store_size=False),
        "deflate": lambda data: zlib.compress(data, DEFLATE_LEVEL),
    }
    if importlib.util.find_spec("zstandard") is not None:  # not a dependency: for this measurement alone
        known["zstd"] = importlib.import_module("zstandard").ZstdCompressor(level=ZSTD_LEVEL).compress
    return known


COMPRESSORS = _compressors()


@dataclass(frozen=True, slots=True)
class Gains:
    """bytes_per_parameter of the payload; taken_off: by compressor, as a part of it, below 0 where it adds."""

    bytes_per_parameter: float
    payloads: int
    taken_off: dict[str, float]

    def values(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def gains_of(name: str, steps: int) -> Gains:
    """Train, compress. Raises Refused as training does."""
    payloads, parameters = _payloads(name, steps)
    total = sum(len(payload) for payload in payloads)
    taken_off = {
        compressor: 1.0 - sum(len(compress(payload)) for payload in payloads) / total for compressor, compress in COMPRESSORS.items()
    }
    return Gains(total / parameters, len(payloads), taken_off)


def _payloads(name: str, steps: int) -> tuple[list[bytes], int]:
    """Payloads of the second half, and the number of parameters that all of them together stand for."""
    part: Literal["share", "one"] = "one" if name.startswith(("topk", "lowrank")) else "share"
    config = RunConfig(
        run=RunSection(name="codecs"),
        batch=BatchSection(fragments=8, length=128),
        optimizer=OptimizerSection(rate=RATE, warmup_batches=max(1, steps // 2)),
        swarm=SwarmSection(
            budget_batches=steps * PEERS, publish_every_steps=EVERY_STEPS, codec=name, own_leak=part, momentum_keep=part,
            chunk_params=CHUNK_PARAMS,
        ),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="tscale-bench-") as folder:
        data = prepare_data(DataSection(), Path(folder))
        manifest, start = create_run(config, data, admin_key=bytes(32), created_unix=0.0)
        members = _members(config, RunTerms.of(manifest), data, start)
        found: list[bytes] = []
        for step in range(1, steps + 1):
            for member in members:
                member.step()
            if step % EVERY_STEPS == 0:
                bodies = _exchange(members)
                found += bodies if step > steps // 2 else []
    return [_payload_of(body) for body in found], PEERS * len(start) * (steps // EVERY_STEPS - steps // 2 // EVERY_STEPS)


def _members(config: RunConfig, run: RunTerms, data: TokenData, start: Tensor) -> list[Member]:
    device, clock, budget = choose_device("cpu"), SystemClock(), config.swarm.budget_batches
    trainers = [
        build_trainer(config.recipe(), data, device, start, peer_id=f"peer-{number}", budget_batches=budget, clock=clock)
        for number in range(PEERS)
    ]
    return [Member(run, start, trainer, clock) for trainer in trainers]


def _exchange(members: list[Member]) -> list[bytes]:
    """Everybody publishes, then hears the others, at once."""
    published = [member.publish(1.0 / PEERS) for member in members]
    for at, member in enumerate(members):
        member.receive([body for author, bodies in enumerate(published) if author != at for body in bodies])
    return [body for bodies in published for body in bodies]


def _payload_of(body: bytes) -> bytes:
    """What lies between header and signature (docs/protocol.md, Packets)."""
    header = int.from_bytes(body[:2], "little")
    return body[2 + header : -SIGNATURE_BYTES]
