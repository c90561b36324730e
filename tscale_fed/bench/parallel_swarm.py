"""Row `swarm` of `bench parallel`: one real peer per GPU, each behind a slow line, exchanging over loopback.

Enters: the job of the other rows. Leaves: figures like theirs. The processes are those that a user starts; they see the other rows' text,
batches, rate and held-out set. Newcomers fetch the model before the lines are slowed down and training is let go, as a join at 100 Mbit/s
would take longer than the row; from then on every peer's bytes go through a relay of its own (slow_link.py). It ends with all peers
paused and equal, at the same number of tokens as the other rows.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tscale_fed.bench.parallel_rows import SEED, Job
from tscale_fed.bench.slow_link import LOOPBACK, SlowLink
from tscale_fed.control_client import AsyncControlClient
from tscale_fed.demo_process import DemoProcess
from tscale_fed.home import make_private
from tscale_fed.limits import DEMO_QUIET_S
from tscale_fed.status import Status
from tscale_net.errors import Refused
from tscale_net.ports import SystemClock

LOOK_S = 0.25
JOIN_S = 240.0
"""Starting one peer: importing, drawing or fetching weights, compiling kernels."""
FAILURE_LINES = 4
"""Of a peer that died: the end of its output, which says why."""
EVALUATE_S = 5.0
"""Between two held-out losses of the basepoint."""


def measure_swarm(job: Job, folder: Path, arguments: argparse.Namespace, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """The row; what cannot run is a row with its reason."""
    try:
        return asyncio.run(_Swarm(job, folder / "swarm", arguments, say).run(seconds))
    except Refused as refused:
        first, *rest = refused.detail.splitlines()
        return {"row": "swarm", "ranks": arguments.gpus, "failure": " ".join([first, *(line.strip() for line in rest[-FAILURE_LINES:])])}


class _Swarm:
    def __init__(self, job: Job, folder: Path, arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
        make_private(folder)
        self._job, self._folder, self._arguments, self._say = job, folder, arguments, say
        self._count = arguments.gpus
        self._peers = [DemoProcess(f"peer-{i}", folder, SystemClock(), start_s=JOIN_S) for i in range(self._count)]
        self._controls = [AsyncControlClient(peer.home) for peer in self._peers]
        self._links: list[SlowLink] = []
        self._seen: dict[int, Status] = {}
        self._batch_tokens = job.fragments * job.accumulate * (job.tokens - 1)
        self._train: list[tuple[int, float]] = []
        self._held_out: list[tuple[int, float]] = []

    async def run(self, seconds: float) -> dict[str, Any]:
        started = time.monotonic()
        try:
            await self._start()
            start_s = time.monotonic() - started
            self._say(f"swarm: {self._count} peers joined in {start_s:.0f} s, lines now of {self._arguments.megabits:g} Mbit/s")
            self._slow_down()
            return {**await self._train_all(seconds - start_s), "start_s": round(start_s, 1)}
        finally:
            await asyncio.gather(*(peer.leave() for peer in self._peers))
            for link in self._links:
                await link.close()

    async def _start(self) -> None:
        """All peers, joined and paused."""
        config = self._folder / "run.toml"
        config.write_text(self._config())
        entry = ""
        for index, peer in enumerate(self._peers):
            port = _free_pair()
            outside = SlowLink(LOOPBACK, port)
            self._links.append(outside)
            front = await outside.open()
            device = "cpu" if self._job.device == "cpu" else f"cuda:{index}"
            where = ("--listen", f"{LOOPBACK}:{port}", "--advertise", f"{LOOPBACK}:{front}", "--device", device, "--threads", "1")
            role = ("--role", "seed", "--config", str(config)) if index == 0 else ("--bootstrap", entry)
            status = await peer.start(*role, *where)
            await peer.pause()
            if index == 0:
                entry = f"{status.peer}@{LOOPBACK}:{front}"

    def _config(self) -> str:
        job, count = self._job, self._count
        return f"""
[run]
name = "parallel"
seed = {SEED}
[model]
dims = "{job.dims}"
[data]
sources = ["{job.source}"]
tokenizer = "{job.tokenizer}"
[batch]
fragments = {job.fragments}
length = {job.tokens}
accumulate = {job.accumulate}
[optimizer]
rate = {job.rate}
warmup_batches = {job.warm_up * count}
[swarm]
budget_batches = {job.steps * count * 4}
publish_every_steps = {self._arguments.publish_every}
[eval]
every_s = {EVALUATE_S}
fragments = {job.evaluation.fragments}
batches = {job.evaluation.batches}
[checkpoint]
every_s = 0
[device]
precision = "{job.precision}"
attention = "{job.attention}"
micro_batch = {job.micro_batch}
"""

    def _slow_down(self) -> None:
        for link in self._links:
            link.limit(self._arguments.megabits * 1e6 / 8, self._arguments.delay_ms / 2e3)

    async def _train_all(self, seconds: float) -> dict[str, Any]:
        await self._look()
        before, began = dict(self._seen), time.monotonic()
        target = self._job.steps * self._count * self._batch_tokens
        for control in self._controls:
            await control.command("resume")
        while self._tokens() < target and time.monotonic() - began < seconds:
            await asyncio.sleep(LOOK_S)
            await self._look()
            self._note()
        took, after = time.monotonic() - began, dict(self._seen)
        for peer in self._peers:
            await peer.pause()
        equal = await self._settle()
        self._note()
        return self._figures(before, after, took, equal)

    def _figures(self, before: dict[int, Status], after: dict[int, Status], took_s: float, equal: bool) -> dict[str, Any]:
        tokens = sum(after[i].tokens - before[i].tokens for i in after)
        steps = sum(after[i].step - before[i].step for i in after)
        sent = sum(after[i].wire.up_bytes - before[i].wire.up_bytes for i in after)
        return {
            "row": "swarm",
            "ranks": self._count,
            "line": {"bits_per_s": self._arguments.megabits * 1e6, "round_trip_ms": self._arguments.delay_ms, "joined": "before the limit"},
            "publish_every_steps": self._arguments.publish_every,
            "tokens_per_s": tokens / took_s,
            "ms_per_step": took_s * self._count / max(steps, 1) * 1e3,
            "tokens_per_step": tokens / max(steps, 1),
            "bytes_per_step_and_rank": sent // max(steps, 1),
            "sent_bytes": sent,
            "relayed_bytes": sum(link.there.moved_bytes + link.back.moved_bytes for link in self._links),
            "busy_fraction": [after[i].busy_fraction for i in after],
            "replicas": "bit-identical" if equal else "not compared: they did not come to rest",
            "deltas": [after[i].wire.deltas_sent for i in after],
            "refused": [after[i].refused for i in after],
            "plan": after[0].device,
            "train_loss": self._train,
            "held_out_loss": self._held_out,
        }

    async def _settle(self) -> bool:
        """Wait until all hold the same, then for a held-out loss of that. Whether their basepoints are equal."""

        def equal() -> bool:
            return len({status.applied_digest for status in self._seen.values()}) == 1

        await self._until(equal, DEMO_QUIET_S)
        same = equal() and len({status.basepoint_hash for status in self._seen.values()}) == 1
        await self._until(lambda: False, 2 * EVALUATE_S)
        return same

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        began = time.monotonic()
        while not condition() and time.monotonic() - began < seconds:
            await asyncio.sleep(LOOK_S)
            await self._look()

    async def _look(self) -> None:
        for index, peer in enumerate(self._peers):
            status = await peer.snapshot()
            if status is not None:
                self._seen[index] = status

    def _tokens(self) -> int:
        return sum(status.tokens for status in self._seen.values())

    def _note(self) -> None:
        """Points of the two curves, where something is new."""
        tokens = self._tokens()
        losses = [status.train_loss for status in self._seen.values() if status.train_loss is not None]
        if losses and (not self._train or tokens > self._train[-1][0]):
            self._train.append((tokens, sum(losses) / len(losses)))
        loss = self._seen[0].swarm_loss
        if loss is not None and (not self._held_out or loss != self._held_out[-1][1]):
            self._held_out.append((tokens, loss))


def _free_pair() -> int:
    """A port that is free, and the next one too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind((LOOPBACK, 0))
            port = int(first.getsockname()[1])
            try:
                second.bind((LOOPBACK, port + 1))
            except (OSError, OverflowError):
                continue
            return port
