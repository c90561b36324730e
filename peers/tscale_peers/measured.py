"""Held-out losses: what this peer measured, and the newest that anybody measured.

Enters: own measurements, peers' records. Leaves: the measurement to show. Every peer measures on the run's fixed held-out text, so that
losses of different peers can be compared; a peer that does not measure shows what others say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tscale_peers.records import PeerRecord


@dataclass(frozen=True, slots=True)
class Measured:
    """Losses in nats per token; NaN: unknown. `batches`: of the swarm, in the basepoint that was measured. `by`: whose word, empty: own."""

    batches: int
    loss: float
    average_loss: float
    by: str = ""

    @property
    def known(self) -> bool:
        return math.isfinite(self.loss)


NOT_MEASURED = Measured(0, math.nan, math.nan)


def newest(own: Measured, records: Iterable[PeerRecord]) -> Measured:
    """The measurement of the latest basepoint; of equal ones the own, then the lowest peer id, so that it does not flicker."""
    best = own if own.known else NOT_MEASURED
    for record in sorted(records, key=lambda record: record.peer):
        if math.isfinite(record.eval_loss) and (not best.known or record.eval_batches > best.batches):
            best = Measured(record.eval_batches, record.eval_loss, record.average_loss, record.name)
    return best
