"""Publications wait until exchanges take little enough of the time."""

from __future__ import annotations

import pytest
import torch
from core_kit import new_exchange, terms

from tscale_peers import limits
from tscale_peers.delta_log import MemoryLog
from tscale_peers.meeting import MeetingPoint, Progress
from tscale_peers.packet import Packet

STEP_S = 0.1


class DearClock:
    """Every look at it takes `cost_s`: so meetings cost time, in proportion to what they do."""

    def __init__(self) -> None:
        self.time = 100.0
        self.cost_s = 0.0

    def now(self) -> float:
        self.time += self.cost_s
        return self.time

    def wall(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing here may sleep")


def publications(clock: DearClock, steps: int) -> tuple[int, MeetingPoint]:
    """How many of so many steps were published after, the run's interval being one step."""
    log, t = MemoryLog(), terms()
    exchange = new_exchange(1, log=log)
    meeting = MeetingPoint(exchange, exchange.replica, log, 1, clock, lambda body: Packet.decode(body, t))
    meeting.may_publish = True
    published = 0
    for step in range(1, steps + 1):
        clock.time += STEP_S
        exchange.weights.add_(torch.full_like(exchange.weights, 1e-3))
        published += bool(meeting.meet(Progress(step, step, step, 1.0, trained=True)).published)
    return published, meeting


def test_cheap_exchanges_come_after_every_step() -> None:
    assert publications(DearClock(), 20)[0] == 20


@pytest.mark.parametrize("cost_s", [0.01, 0.1])
def test_dear_exchanges_come_as_often_as_their_part_of_the_time_allows(cost_s: float) -> None:
    clock = DearClock()
    clock.cost_s = cost_s
    begun = clock.time
    published, meeting = publications(clock, 400)
    spent, took = meeting.time.spent.publish + meeting.time.spent.receive, clock.time - begun
    one = spent / published
    assert spent <= limits.exchange_time_fraction * took + one
    assert spent >= 0.5 * limits.exchange_time_fraction * took, "nor is the time for exchanges left unused"
    assert 1 < published < 400
