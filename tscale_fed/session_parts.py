"""The parts of a running peer, made anew or restored from its home.

Enters: ground, run, device. Leaves: `Built`: trainer, replica, swarm peer, log and checkpoints that fit together. In this order:
    the newest undamaged checkpoint, or the start weights (a new run; a seed that died before its first checkpoint), or an empty replica
    own packets that the log has and the checkpoint lacks
"""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from tscale_fed.assembly import build_trainer
from tscale_fed.averaging import average_of, has_room
from tscale_fed.checkpoint import Checkpoint, CheckpointStore
from tscale_fed.device import Device
from tscale_fed.find_run import FoundRun
from tscale_fed.ground import Ground
from tscale_fed.home_run import stream_number
from tscale_fed.neighbours import known_neighbours
from tscale_fed.new_run import start_of
from tscale_fed.swarm_memory import basepoint_device, room_held
from tscale_fed.trainer import Trainer
from tscale_net.errors import Refused
from tscale_peers.applied import AppliedSet
from tscale_peers.assembly import RunTerms, Saved, assemble
from tscale_peers.basepoint import Replica
from tscale_peers.delta_log import DeltaLog
from tscale_peers.meeting import Progress
from tscale_peers.peer import PeerSettings, SwarmPeer
from tscale_peers.restart import settle_after_crash


@dataclass(slots=True)
class Built:
    """The parts of a session."""

    device: Device
    trainer: Trainer
    replica: Replica
    peer: SwarmPeer
    log: DeltaLog
    store: CheckpointStore
    checkpoint: Checkpoint | None
    empty: bool
    """The replica waits for a snapshot."""
    helper: Executor
    """Makes publications and hashes beside training."""


def build(ground: Ground, found: FoundRun, device: Device) -> Built:
    """Everything of the run on this machine. Raises Refused with one sentence for what does not fit."""
    run = RunTerms.of(found.manifest)
    where = basepoint_device(found, device, ground.console.say)
    replica = run.new_replica(where)
    log = DeltaLog(ground.home.delta_log)
    pledge_log = DeltaLog(ground.home.contributions)
    for remark in log.notices + pledge_log.notices:
        ground.console.warn(remark)
    store = CheckpointStore(ground.home.checkpoints, found.config.checkpoint.keep)
    checkpoint, remarks = store.latest()
    for remark in remarks:
        ground.console.warn(remark)
    start = None
    if checkpoint is not None:
        _check_checkpoint(checkpoint, found)
        applied = AppliedSet.decode(checkpoint.blobs["applied"], replica.applied.chunks, replica.applied.max_streams)
        replica.restore(checkpoint.tensors["basepoint"], applied)
    else:
        start = found.start if found.start is not None else _start_again(ground, found)
        if start is not None:
            replica.set_start(start)
    # Before the engine plans with what memory is left.
    wish = found.config.eval.average
    wanted = wish == "on" or (wish == "auto" and has_room(replica.layout.size, where))
    average = average_of(run, replica, log, checkpoint) if wanted else None
    with room_held(where, replica.layout.size):
        trainer = build_trainer(
            found.recipe, found.data, device, replica.weights(),
            peer_id=ground.identity.peer_id, budget_batches=found.manifest.budget_batches, clock=ground.clock,
            say=ground.console.say,
        )  # fmt: skip
    saved = None
    if checkpoint is not None:
        trainer.load_state(checkpoint.tensors, checkpoint.facts)
        blobs = checkpoint.blobs
        saved = Saved(checkpoint.tensors["displacement"].clone(), blobs["paid"], blobs.get("pledges"), blobs.get("sums", b""))
    empty = checkpoint is None and start is None
    arguments = ground.arguments
    remembered = () if arguments.solo else known_neighbours(ground.home)
    settings = PeerSettings(
        ground.name, arguments.role, tuple(arguments.bootstrap), ground.addresses, remembered, max_upload_bytes_s=arguments.max_upload
    )
    peer = assemble(
        run, ground.identity, ground.outside, replica=replica, weights=trainer.weights, log=log,
        stream=stream_number(ground.home, ground.outside.rng), settings=settings, board=ground.board, joined=not empty, saved=saved,
        pledge_log=pledge_log, helper=(helper := ThreadPoolExecutor(1, "exchange")),
    )  # fmt: skip
    peer.meeting.average = average
    _settle_after_crash(ground, peer, trainer, checkpoint)
    peer.meeting.resume_at(progress_of(trainer, trained=False))
    return Built(device, trainer, replica, peer, log, store, checkpoint, empty, helper)


def _check_checkpoint(checkpoint: Checkpoint, found: FoundRun) -> None:
    run = checkpoint.facts.get("run")
    if run != found.manifest.run_id.hex():
        whose = f"run {str(run)[:8]}" if run else "`tscale train`"
        detail = f"{checkpoint.path} is a checkpoint of {whose}, not of run {found.manifest.name}: name another --home DIR"
        raise Refused("other-run", detail)


def _start_again(ground: Ground, found: FoundRun) -> Tensor | None:
    """A seed that died before its first checkpoint begins at the start weights again: its log, and the swarm, have the rest."""
    if ground.arguments.role != "seed" and not ground.arguments.solo:
        return None
    return start_of(found.manifest, found.recipe, found.data.vocab)


def _settle_after_crash(ground: Ground, peer: SwarmPeer, trainer: Trainer, checkpoint: Checkpoint | None) -> None:
    """See restart.py; said for people."""
    # Parts of a large checkpoint may be older than its end.
    trained = trainer.steps if checkpoint is None else checkpoint.facts.get("copied_from_step", trainer.steps)
    displacement = checkpoint.tensors["displacement"] if checkpoint is not None else None
    recovered = settle_after_crash(peer.meeting, trained, displacement)
    if recovered:
        ground.console.say(f"{recovered} own packets recovered from the log")


def progress_of(trainer: Trainer, trained: bool) -> Progress:
    """A step is a batch: the counts of this home's author stream."""
    return Progress(trainer.steps, trainer.steps, trainer.tokens, trainer.loss_average, trained)
