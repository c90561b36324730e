"""What the demo prints: a line of figures every few seconds, and a summary. Pure functions and one small collector.

Enters: snapshots of the processes. Leaves: text, and the verdict whether states that peers had in common were bit-equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tscale_fed.status import Status
from tscale_fed.status_text import loss_text
from tscale_fed.units import bytes_text, short_hex

FP32_BYTES = 4


@dataclass
class States:
    """Which basepoint hashes were seen for each applied set, and by whom."""

    hashes: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, label: str, status: Status) -> None:
        """Note the state now and the recent ones."""
        for state in status.recent:
            self.hashes.setdefault(state.applied_digest, {})[label] = state.basepoint_hash
        if status.applied_digest:
            self.hashes.setdefault(status.applied_digest, {})[label] = status.basepoint_hash

    @property
    def shared(self) -> int:
        """Applied sets that at least two peers had."""
        return sum(len(seen) > 1 for seen in self.hashes.values())

    @property
    def differing(self) -> list[str]:
        """Applied sets for which two peers had different bits; must be empty."""
        return [digest for digest, seen in self.hashes.items() if len(set(seen.values())) > 1]


def untrained_loss(status: Status) -> float | None:
    """Held-out loss of the basepoint at the first evaluation that the snapshot still holds."""
    return next((point.swarm for point in status.losses if point.swarm is not None), None)


def figures_line(statuses: Mapping[str, Status], states: States) -> str:
    """One line: held-out loss as each process measured it last, steps, deltas, states compared."""
    losses = [status.swarm_loss for status in statuses.values() if status.swarm_loss is not None]
    steps = " + ".join(str(status.step) for status in statuses.values())
    sent = sum(status.wire.deltas_sent for status in statuses.values())
    applied = sum(status.wire.deltas_applied for status in statuses.values())
    agree = f"{states.shared} common states" + (", all equal" if not states.differing else f", {len(states.differing)} DIFFER")
    return f"held-out loss {loss_text(min(losses, default=None))}   steps {steps}   deltas {sent} sent, {applied} applied   {agree}"


def summary(before: float | None, statuses: Mapping[str, Status], states: States) -> list[str]:
    """The closing lines."""
    after = min((status.swarm_loss for status in statuses.values() if status.swarm_loss is not None), default=None)
    lines = [f"held-out loss of the basepoint: {loss_text(before)} -> {loss_text(after)} nats per token"]
    for label, status in statuses.items():
        wire = status.wire
        lines.append(
            f"{label:<8} {status.name:<16} {status.step:>5} steps  {wire.deltas_sent:>4} deltas sent  "
            f"{bytes_text(wire.up_bytes):>8} sent  {bytes_text(wire.down_bytes):>8} received  model {short_hex(status.basepoint_hash)}"
        )
    densities = [status.wire.bytes_per_param for status in statuses.values() if status.wire.bytes_per_param is not None]
    if densities:
        lines.append(f"a delta is {max(densities):.3f} bytes per weight; the weights themselves are {FP32_BYTES}")
    return [*lines, _verdict(statuses, states)]


def equal_now(statuses: Mapping[str, Status]) -> bool:
    """All processes hold the same deltas."""
    return len({status.applied_digest for status in statuses.values()}) == 1


def _verdict(statuses: Mapping[str, Status], states: States) -> str:
    if states.differing:
        return f"FAILED: {len(states.differing)} states with the same deltas differ in their bits"
    if not equal_now(statuses):
        return f"the last deltas had not reached everybody; {states.shared} earlier common states were equal bit for bit"
    return f"all {len(statuses)} hold the same model, bit for bit; so were {states.shared} common states on the way"
