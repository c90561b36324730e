"""One running peer, once its run and text are known: swarm, training, evaluation, checkpoints, goodbye.

Enters: ground, run, and the parts built for them (session_parts.py). Leaves: a trained, published, checkpointed share of the run:
    enter      links; a newcomer fetches the snapshot and a donor's optimizer statistics, a returning peer catches up
    train      the training thread meets the swarm between its steps; evaluation and checkpoints run between steps too
    leave      publish the rest, hand it over, save
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from torch import Tensor

from tscale_fed.assembly import build_evaluator
from tscale_fed.averaging import BestModel
from tscale_fed.control import Command
from tscale_fed.data.serving import DataServer
from tscale_fed.find_run import FoundRun
from tscale_fed.ground import Ground
from tscale_fed.limits import DONOR_STATE_S, LINGER_S, NEIGHBOURS_S, STATUS_INTERVAL_S
from tscale_fed.neighbours import addresses_to_keep, remember_neighbours
from tscale_fed.returning import Returning
from tscale_fed.session_parts import Built, progress_of
from tscale_fed.session_state import StateCopy
from tscale_fed.status import LossHistory, Phase
from tscale_fed.trainer import Trainer
from tscale_fed.training_thread import Priority, TrainingThread, default_threads
from tscale_net.errors import Refused
from tscale_net.transfer import BlobSource
from tscale_peers import limits as swarm_limits
from tscale_peers.donor import TRAINER_STATE, provide_from
from tscale_peers.joining import fetch_snapshot, reload_when_needed
from tscale_peers.measured import Measured
from tscale_peers.meeting_time import Seconds


class PeerSession:
    """Runs the parts. `stop` is set by signals, by the control socket, or when the time is over."""

    def __init__(self, ground: Ground, found: FoundRun, built: Built, stop: asyncio.Event) -> None:
        self.ground = ground
        self.found = found
        self.built = built
        self.phase: Phase = "joining"
        self.stop = stop
        self.losses = LossHistory()
        self.displacement = math.nan
        """Norm of the displacement over the norm of the basepoint, at the last evaluation."""
        self.snapshot_progress: tuple[int, int] | None = None
        """Bytes here and in all while a snapshot is being fetched."""
        wished = ground.arguments.threads or found.config.device.threads
        threads = wished or default_threads(built.device.torch_device, beside_event_loop=True)
        self.training = TrainingThread(built.trainer, ground.clock, Priority(threads), self._meet)
        self._evaluator = build_evaluator(found.recipe, found.data, found.config.eval, built.device, ground.clock)
        self.best = BestModel(ground.home, found.manifest.run_id.hex())
        self._average_measured: int | None = None
        """Window whose average was measured last."""
        self._average_loss = math.nan
        self._welcomed = False
        self.returning: Returning | None = None
        self._neighbours: tuple[str, ...] = ()

    def commands(self) -> Mapping[str, Command]:
        """What the control socket may ask."""
        return {"stop": self._stop, "pause": self._pause, "resume": self._resume}

    def _stop(self) -> str:
        self.stop.set()
        return "stopping: unpublished work is handed over first"

    def _pause(self) -> str:
        self.training.pause()
        return "paused: still connected, not training"

    def _resume(self) -> str:
        self.training.resume()
        return "training goes on"

    async def run(self) -> None:
        """Until `stop`. Raises Refused or TrainingFailed for what ended it otherwise; work done is saved first where possible."""
        ground, peer = self.ground, self.built.peer
        self._serve_blobs()
        swarm = asyncio.create_task(peer.run())
        try:
            async with asyncio.TaskGroup() as tasks:
                reload_when_needed(peer, self.found.manifest, tasks)
                main = tasks.create_task(self._live())
                tasks.create_task(self._watch(swarm, main))
        finally:
            self.phase = "leaving"
            await self.training.stop()
            peer.training_active = False
            if not swarm.done():
                await self._leave()
            swarm.cancel()
            await asyncio.gather(swarm, return_exceptions=True)
            unsaved = self._save()
            self.built.helper.shutdown()
            await ground.outside.transport.close(LINGER_S)
        if unsaved is not None:
            raise unsaved

    async def _watch(self, swarm: asyncio.Task[None], main: asyncio.Task[None]) -> None:
        """A fault of the swarm's tasks ends the session with that fault."""
        await asyncio.wait({swarm, main}, return_when=asyncio.FIRST_COMPLETED)
        if swarm.done():
            swarm.result()

    # -- entering ----------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        enter = asyncio.create_task(self._enter())
        stop = asyncio.create_task(self.stop.wait())
        try:
            await asyncio.wait({enter, stop}, return_when=asyncio.FIRST_COMPLETED)
            if enter.done():
                enter.result()
                await self._train()
        finally:
            for task in (enter, stop):
                task.cancel()
            await asyncio.gather(enter, stop, return_exceptions=True)

    async def _enter(self) -> None:
        if self.built.empty:
            await self._join()
        elif self.found.start is None:
            await self._return()
        else:
            self.ground.console.say(f"new run {self.found.manifest.name}: {self.built.replica.layout.size / 1e6:.2f} million weights")

    async def _join(self) -> None:
        peer, trainer = self.built.peer, self.built.trainer
        total = self.built.replica.layout.size * 4

        def progress(here: int, chunks: int, received: int) -> None:
            self.snapshot_progress = (received, max(total, received))
            whole = received if here == chunks else max(total, received + 1)
            self.ground.console.progress("snapshot", received, whole, sources=len(peer.linked))

        await fetch_snapshot(peer, self.found.manifest, progress)
        self.snapshot_progress = None
        await self._adopt_statistics()
        trainer.mark_joined()
        trainer.tell_swarm_batches(peer.swarm_batches())
        self.ground.console.say(f"basepoint {self.built.replica.hash().hex()[:8]} is here, {peer.swarm_batches()} batches in it")

    async def _adopt_statistics(self) -> None:
        """Second moments and step count of a donor. Without them training starts with empty statistics, which costs some steps."""
        peer, trainer = self.built.peer, self.built.trainer
        try:
            async with asyncio.timeout(DONOR_STATE_S):
                data = await self.ground.outside.transfers.fetch(
                    TRAINER_STATE, sorted(peer.linked), max_bytes=trainer.donor_state_max_bytes()
                )
            trainer.adopt(data)
        except (Refused, TimeoutError) as error:
            why = error.detail if isinstance(error, Refused) else "no answer in time"
            self.ground.console.warn(f"no optimizer statistics from the swarm ({why}): the first steps will be rougher")

    async def _return(self) -> None:
        """Catch up, then decide whether the private work of last time is still of use."""
        peer, checkpoint = self.built.peer, self.built.checkpoint
        where = f"checkpoint of step {self.built.trainer.steps}" if checkpoint is not None else "no checkpoint yet: start weights and log"
        self.ground.console.say(f"{where} restored")
        self.returning = returning = Returning(self.ground, self.found, self.built)
        if not self.ground.arguments.solo and returning.has_others:
            await returning.catch_up()
        if returning.caught_up or not returning.has_others:
            await peer.off_loop(returning.judge)
        self.built.trainer.tell_swarm_batches(peer.swarm_batches())

    async def _judge_late(self) -> None:
        """For a peer that came back alone: judge when the first neighbour has been heard."""
        returning = self.returning
        if returning is not None and not returning.judged and returning.caught_up:
            await self.training.call(lambda trainer: returning.judge())

    # -- training ----------------------------------------------------------------------------------------------------

    async def _train(self) -> None:
        batch, manifest = self.found.recipe.batch, self.found.manifest
        tokens = batch.fragments * batch.accumulate * batch.length
        every = manifest.publish_every_steps
        often = f"every {every} steps" if every > 1 else "after every step"
        plan = f"plan: {tokens} tokens a step, a delta {often}, less often where links or the time for exchanges ask for it"
        self.ground.console.say(f"{self.built.device.reason}  {plan}")
        self.built.peer.training_active = True
        await self.built.peer.off_loop(lambda: None)  # an idle meeting that has begun ends before the first step
        self.phase = "training"
        self.training.start()
        async with asyncio.TaskGroup() as tasks:
            ends = [tasks.create_task(self.training.finished()), tasks.create_task(self.stop.wait())]
            helpers = [
                tasks.create_task(self._every(self.found.config.eval.every_s, self._evaluate, at_once=True)),
                tasks.create_task(self._every(self.found.config.checkpoint.every_s, self._checkpoint)),
                tasks.create_task(self._every(swarm_limits.idle_meeting_s, self._meet_if_paused)),
                tasks.create_task(self._every(swarm_limits.idle_meeting_s, self._judge_late)),
                tasks.create_task(self._every(NEIGHBOURS_S, self._remember_neighbours, at_once=True)),
                tasks.create_task(self._show_status()),
            ]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in (*ends, *helpers):
                task.cancel()

    def _meet(self, trainer: Trainer) -> Seconds:
        """On the training thread, after each step. What it cost, by cause."""
        peer = self.built.peer
        before = peer.meeting.time.spent
        met = peer.meeting.meet(progress_of(trainer, trained=True))
        trainer.scale_momentum(met.momentum_keep)
        trainer.tell_swarm_batches(peer.others_batches() + trainer.steps)
        return peer.meeting.time.spent.since(before)

    async def _meet_if_paused(self) -> None:
        """While training stands still, what others publish is applied all the same; on the training thread, so no step begins meanwhile."""
        if self.training.report.paused:
            await self.training.call(lambda trainer: self.built.peer.meeting.meet_idle())

    async def _remember_neighbours(self) -> None:
        """So that a restart finds them. Without it --bootstrap still works, hence only a warning."""
        now = addresses_to_keep(self.built.peer.membership.known())
        if not now or now == self._neighbours:
            return
        self._neighbours = now
        try:
            await asyncio.to_thread(remember_neighbours, self.ground.home, now)
        except Refused as refusal:
            self.ground.console.warn(refusal.detail)

    async def _every(self, seconds: float, work: Callable[[], Awaitable[None]], at_once: bool = False) -> None:
        if seconds <= 0:
            return
        if at_once:
            await work()
        while True:
            await self.ground.clock.sleep(seconds)
            await work()

    async def _evaluate(self) -> None:
        """Held-out loss of the basepoint, and how large the unpublished work is beside it, between two steps."""

        def measure(_: Trainer) -> tuple[float, float]:
            basepoint = self.built.replica.weights()
            self._offer(basepoint, loss := self._evaluator.loss(basepoint).loss, "basepoint")
            self._measure_average()
            return loss, self.built.peer.meeting.displacement_norm() / max(float(basepoint.norm()), 1e-30)

        batches = self.built.peer.swarm_batches()
        loss, self.displacement = await self.training.call(measure)
        self.built.peer.measured = Measured(batches, loss, self._average_loss)
        self.losses.add(self.built.trainer.steps, self.training.report.loss_average, loss)

    def _measure_average(self) -> None:
        """The running average too, once for each window."""
        average = self.built.peer.meeting.average
        if average is None or average.finished_window in (None, self._average_measured):
            return
        weights = average.weights()
        assert weights is not None
        self._average_measured, self._average_loss = average.finished_window, self._evaluator.loss(weights).loss
        self._offer(weights, self._average_loss, "average")

    def _offer(self, weights: Tensor, loss: float, what: str) -> None:
        try:
            self.best.offer(weights, loss, what, self.built.trainer.steps, self.built.peer.swarm_batches())
        except Refused as refusal:
            self.ground.console.warn(refusal.detail)

    async def _show_status(self) -> None:
        from tscale_fed.peer_status import status_of

        while True:
            report = self.training.report
            self.losses.add(report.steps, report.loss_average, None)
            self.ground.console.status(status_of(self))
            self._welcome()
            await self.ground.clock.sleep(STATUS_INTERVAL_S)

    def _welcome(self) -> None:
        peer = self.built.peer
        if not self._welcomed and peer.published and peer.linked and not peer.unheld():
            self._welcomed = True
            linked = f"{len(peer.linked)} peer{'s are' if len(peer.linked) > 1 else ' is'} linked"
            self.ground.console.say(f"✓ your first delta is in: {linked}, weight {peer.share():.0%}. You are useful.")

    # -- saving and leaving ------------------------------------------------------------------------------------------

    async def _checkpoint(self) -> None:
        """Copy between steps, write beside training. A failure is shown and training goes on: the last checkpoint is intact."""
        try:
            copy = await asyncio.to_thread(self._copy)
            for part in copy.parts:
                await self.training.call(lambda trainer, part=part: copy.take(part))  # type: ignore[misc]
            state = await self.training.call(lambda trainer: copy.finish())
            await asyncio.to_thread(self.built.store.save, *state)
            self.built.peer.meeting.checkpointed(state[2]["paid"], state[2]["pledges"])
        except Refused as refusal:
            self.ground.console.warn(refusal.detail)

    def _copy(self) -> StateCopy:
        return StateCopy(self.built.peer, self.built.trainer, self._facts)

    def _facts(self) -> dict[str, Any]:
        batches, unix = self.built.peer.swarm_batches(), self.ground.clock.wall()
        return {"run": self.found.manifest.run_id.hex(), "swarm_batches": batches, "unix": unix}

    def _save(self) -> Refused | None:
        """The last checkpoint; returns why it could not be written."""
        if self.built.peer.gossip.hold or not math.isfinite(self.built.peer.meeting.displacement_norm()):
            return None  # nothing of ours yet, or nothing worth keeping
        self.built.peer.meeting.finish_outgoing()
        try:
            state = self._copy().at_once()
            self.built.store.save(*state)
            self.built.peer.meeting.checkpointed(state[2]["paid"], state[2]["pledges"])
        except Refused as refusal:
            return refusal
        return None

    async def _leave(self) -> None:
        if self.ground.arguments.solo or self.built.peer.gossip.hold:
            return
        handed_over = await self.built.peer.leave(self.ground.console.say)
        if self.built.peer.linked:
            held = "a neighbour holds all my deltas" if handed_over else "nobody confirmed my last deltas: they stay in this home's log"
            self.ground.console.say(f"{held}; good-bye")

    def _serve_blobs(self) -> None:
        peer, trainer = self.built.peer, self.built.trainer
        server = DataServer(self.found.data.directory, self.found.data_recipe) if self._has_run_data() else None

        async def extra(name: str) -> BlobSource | None:
            return server.blob(name) if server is not None else None

        chunks = len(self.built.replica.layout.chunks)

        def statistics() -> bytes | None:
            return None if peer.gossip.hold else trainer.donor_state()

        self.ground.outside.transfers.serve(provide_from(peer, self.found.manifest.encode(), chunks, statistics, extra))

    def _has_run_data(self) -> bool:
        return self.found.data.manifest == self.found.data_recipe.data
