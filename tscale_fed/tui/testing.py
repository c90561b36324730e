"""A made-up peer for the status screen: tests and people who work on the screen use it instead of a real run.

Enters: a number of other peers. Leaves: `Status` snapshots that change from call to call, the same for everybody (no clock, no randomness).
`python -m tscale_fed.tui.testing DIR` serves them on the control socket of DIR, so that `tscale-status --home DIR` has something to show.
Nothing here is a measurement.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import sys
from pathlib import Path

from tscale_fed import __version__
from tscale_fed.status import EventHistory, ExchangeTime, LossHistory, PeerRow, RecentState, Status, Transfer, Wire, finite

_FIRST_UNIX_S = 1_790_000_000.0
_NAMES = ("calm-heron", "odd-magpie", "warm-badger", "quiet-falcon", "swift-lynx", "plain-toad", "bright-carp", "stout-wren")
_PARAMETERS = 1_000_000


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class FakePeer:
    """`snapshot()` moves one second on: ten steps, a lower loss, now and then a peer that falls silent."""

    def __init__(self, others: int = 5, *, role: str = "peer") -> None:
        self.others = others
        self.role = role
        self.paused = False
        self.stopped = False
        self._second = 0
        self._step = 0
        self._losses = LossHistory()
        self._events = EventHistory()
        self._events.add(_FIRST_UNIX_S, "joined through calm-heron, snapshot from 3 peers")

    def snapshot(self) -> Status:
        self._second += 1
        if not self.paused:
            self._step += 10
        train = 2.0 + 3.5 * math.exp(-self._step / 400) + 0.05 * math.sin(self._step)
        swarm = 2.0 + 3.5 * math.exp(-self._step / 350)
        self._losses.add(self._step, finite(train), finite(swarm))
        if self._second % 7 == 0:
            self._events.add(_FIRST_UNIX_S + self._second, f"delta {self._second // 7} is in: {self.others} peers have it")
        digest, model = _hash(f"digest {self._step}"), _hash(f"model {self._step}")
        return Status(
            version=__version__,
            run=_hash("run"),
            run_name="made-up-run",
            peer="12D3KooWMadeUpPeerThatDoesNotExistAnywhereAtAll00001",
            name="brave-otter",
            role="seed" if self.role == "seed" else "peer",
            phase="leaving" if self.stopped else "paused" if self.paused else "training",
            uptime_s=float(self._second),
            device="cpu, 2 threads",
            reach="direct: others reach this peer at 192.0.2.7:7700",
            step=self._step,
            tokens=self._step * 2048,
            swarm_tokens=self._step * 2048 * (self.others + 1),
            swarm_batches=self._step * (self.others + 1),
            budget_batches=100_000,
            train_loss=train,
            swarm_loss=swarm,
            basepoint_hash=model,
            applied_digest=digest,
            recent=[RecentState(digest, model)],
            agreeing_peers=max(self.others - 1, 0),
            compared_peers=self.others,
            busy_fraction=0.984,
            exchange_fraction=0.0131,
            exchange=ExchangeTime(receive=0.007, publish=0.005, hash=0.0001, wait=0.001),
            tokens_per_s=0.0 if self.paused else 13_600.0,
            swarm_tokens_per_s=13_600.0 * (self.others + 1),
            rate=0.02,
            share=1 / (self.others + 1),
            displacement=0.013,
            steps_since_publish=self._step % 50,
            publish_every_steps=50,
            peers=[self._row(index) for index in range(self.others)],
            wire=Wire(
                up_bytes=self._step * 14_000,
                down_bytes=self._step * 14_000 * self.others,
                bytes_per_param=0.1375,
                up_bytes_per_s=140_000.0,
                down_bytes_per_s=140_000.0 * self.others,
                deltas_sent=self._step // 50,
                deltas_applied=self._step // 50 * self.others,
            ),
            refused={"bad-signature": 3, "wrong-run": 1},
            transfer=Transfer("snapshot", self._second * _PARAMETERS, 4 * _PARAMETERS, 3) if self._second < 4 else None,
            losses=self._losses.points(),
            events=self._events.lines(),
        )

    def _row(self, index: int) -> PeerRow:
        silent = index % 5 == 4 and self._second % 20 > 10
        name = _NAMES[index % len(_NAMES)] + (f"-{index // len(_NAMES)}" if index >= len(_NAMES) else "")
        return PeerRow(
            id=f"12D3KooWMadeUp{index:038d}",
            name=name,
            path="direct" if index % 3 else "gossip",
            state="suspect" if silent else "live",
            rtt_ms=20.0 + 7 * (index * 13 % 11) if index % 3 else None,
            share=1 / (self.others + 1),
            lag=index * 7 % 4,
            last_delta_s=float((self._second + index * 3) % 12),
            tokens_per_s=12_000.0 + 100 * index,
            address=f"192.0.2.{index % 250}:7700",
        )

    def pause(self) -> str:
        self.paused = True
        return "paused: still connected, not training"

    def resume(self) -> str:
        self.paused = False
        return "training goes on"

    def stop(self) -> str:
        self.stopped = True
        return "leaving: the last deltas go out"


async def _serve(home: Path) -> None:
    from tscale_fed.control import ControlServer

    fake, ended = FakePeer(12), asyncio.Event()

    def stop() -> str:
        ended.set()
        return fake.stop()

    server = ControlServer(home, fake.snapshot, {"pause": fake.pause, "resume": fake.resume, "stop": stop})
    print(f"made-up peer at {await server.start()}; Ctrl+C ends it", flush=True)
    try:
        await ended.wait()
    finally:
        await server.close()


if __name__ == "__main__":
    from tscale_fed.home import make_private

    make_private(Path(sys.argv[1]))
    asyncio.run(_serve(Path(sys.argv[1])))
