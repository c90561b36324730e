"""Groups of processes, for test_parallel.py: `python group_scenarios.py DATA OUT` plays every scene below and writes what it saw as JSON.

Imports happen once; each scene's ranks are forked from here, which takes milliseconds. Nothing is computed before a fork.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training_run import BUDGET, RUN, make_recipe

from tscale_fed.assembly import build_evaluator, build_trainer, model_shape, start_weights
from tscale_fed.bench import parallel as bench_parallel
from tscale_fed.bench import parallel_rows
from tscale_fed.checkpoint import CheckpointStore
from tscale_fed.config import BatchSection, EvalSection, parse_config
from tscale_fed.console import Console
from tscale_fed.data.token_data import Batch, TokenData
from tscale_fed.device import choose_device
from tscale_fed.lone_run import LoneRun
from tscale_fed.model.forward import Model
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import Optimizer, OptimizerSettings
from tscale_fed.parallel.agreement import agree, check_replicas, checksum
from tscale_fed.parallel.exchange import Exchanging
from tscale_fed.parallel.group import Group
from tscale_fed.parallel.hook import OneBitState, onebit_hook
from tscale_fed.parallel.launch import free_port, rank_environments
from tscale_fed.parallel.onebit import TAIL
from tscale_fed.parallel.team import Decision, GroupTeam, replica
from tscale_fed.parallel.world import World, world_from
from tscale_fed.trainer import Trainer
from tscale_net.errors import Refused
from tscale_net.ports import SystemClock

DATA = Path()
Scene = Callable[[Group], Any]


def play(size: int, scene: Scene, opened: bool = True) -> list[Any]:
    """What `scene` returned in each rank of a new group; None for a rank that did not end by itself. `opened`: the scene gets its group."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for environment in rank_environments(os.environ, size, free_port()):
            child = os.fork()
            if child == 0:
                _be_rank(environment, scene, Path(folder), opened)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        found = [Path(folder) / str(rank) for rank in range(size)]
        return [json.loads(path.read_text()) if path.exists() else None for path in found]


def _be_rank(environment: dict[str, str], scene: Callable[[Any], Any], folder: Path, opened: bool) -> None:
    code = 1
    try:
        os.environ.update(environment)
        world = world_from(os.environ)
        assert world is not None
        result = scene(Group.open(world, torch.device("cpu")) if opened else None)
        (folder / str(world.rank)).write_text(json.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def refusal(action: Callable[[], object]) -> str:
    """ "code: sentence" of what it raises, "" if nothing."""
    try:
        action()
    except Refused as refused:
        return f"{refused.code}: {refused.detail}"
    return ""


def trainer_of(group: Group, how: str) -> tuple[Trainer, Exchanging]:
    recipe, data = make_recipe(), TokenData.open(DATA)
    exchanging = Exchanging(how, group)  # type: ignore[arg-type]
    weights = start_weights(recipe, model_shape(recipe, data.vocab))
    key = group.world.data_key("alice")
    trainer = build_trainer(
        recipe, data, choose_device("cpu"), weights, peer_id=key, budget_batches=BUDGET, clock=SystemClock(), exchanging=exchanging
    )
    return trainer, exchanging


# -- scenes ------------------------------------------------------------------------------------------------------------


def train(how: str, steps: int = 4) -> Scene:
    def scene(group: Group) -> dict[str, Any]:
        trainer, exchanging = trainer_of(group, how)
        losses = [trainer.step().loss for _ in range(steps)]
        check_replicas(group, steps, replica(trainer))
        evaluator = build_evaluator(
            trainer.recipe, trainer.data, EvalSection(fragments=2, batches=3), choose_device("cpu"), SystemClock(), group
        )
        return {
            "losses": losses, "checksum": checksum(replica(trainer)), "tokens": trainer.tokens,
            "bytes_per_weight": exchanging.exchange.bytes_per_step / trainer.weights.numel(),
            "weights": trainer.weights[::997].tolist(), "held_out": evaluator.loss(trainer.weights).loss,
        }  # fmt: skip

    return scene


class JoinedData(TokenData):
    """The batches of all ranks of a group in one."""

    ranks = 1

    def batch(self, run_seed: int, peer_id: str, step: int, fragments: int, length: int) -> Batch:
        keys = [World(rank, self.ranks, rank, self.ranks).data_key(peer_id) for rank in range(self.ranks)]
        parts = [super(JoinedData, self).batch(run_seed, key, step, fragments // self.ranks, length) for key in keys]
        return torch.cat([text for text, _ in parts]), torch.cat([target for _, target in parts])


def one_process(ranks: int, steps: int = 4) -> Scene:
    """The same text in one process: a batch `ranks` times as large."""

    def scene(group: Group) -> dict[str, Any]:
        opened = TokenData.open(DATA)
        data = JoinedData(DATA, opened.manifest)
        data.ranks = ranks
        recipe = make_recipe(batch={"fragments": 2 * ranks})
        assert isinstance(recipe.batch, BatchSection)
        weights = start_weights(recipe, model_shape(recipe, data.vocab))
        trainer = build_trainer(recipe, data, choose_device("cpu"), weights, peer_id="alice", budget_batches=BUDGET, clock=SystemClock())
        losses = [trainer.step().loss for _ in range(steps)]
        evaluator = build_evaluator(recipe, data, EvalSection(fragments=2, batches=3), choose_device("cpu"), SystemClock())
        return {"losses": losses, "tokens": trainer.tokens, "weights": trainer.weights[::997].tolist(),
                "held_out": evaluator.loss(trainer.weights).loss}  # fmt: skip

    return scene


def conservation(group: Group) -> dict[str, Any]:
    """Random gradients with a row that nobody has at times; the scale is held constant, so that residuals keep their worth."""
    parameters = Parameters(ModelShape.parse("e128h1d2w16", 37))
    optimizer = Optimizer(parameters, OptimizerSettings())
    exchange = Exchanging("onebit", group).over(parameters, optimizer)
    generator = torch.Generator().manual_seed(group.world.rank)
    put_in, delivered = torch.zeros(2, parameters.flat.numel(), dtype=torch.float64)
    for step in range(5):
        gradient = torch.randn(parameters.flat.numel(), generator=generator)
        for view in parameters.grads.values():
            view.copy_(gradient[: view.numel()].view_as(view))
            view /= view.square().mean().sqrt() if view is not parameters.grads["embedding"] else 1.0
        parameters.grads["embedding"] /= parameters.grads["embedding"].square().mean(1, keepdim=True).sqrt()
        parameters.grads["final"] /= parameters.grads["final"].square().mean(1, keepdim=True).sqrt()
        if step % 2:
            parameters.grads["embedding"][5] = 0.0
        put_in += group.reduce(parameters.flat_grad.double(), "mean")
        for index in range(len(exchange.buckets)):
            exchange.ready(index)
        exchange.finish()
        delivered += parameters.flat_grad.double()
    kept = exchange.even_out()[TAIL].double()
    still = parameters.spans["embedding"][0] + 5 * 128  # its S decays while it is silent, so its residual changes its worth
    off = (put_in - delivered - kept).abs()
    off[still : still + 128] = 0.0
    return {"off": float(off.max()), "kept": float(kept.square().mean().sqrt()), "checksum": checksum([parameters.flat_grad])}


def resume(path: Path, first: bool) -> Scene:
    """Two steps and a checkpoint, or that checkpoint in a group of any size."""

    def scene(group: Group) -> dict[str, Any]:
        trainer, exchanging = trainer_of(group, "onebit")
        team = GroupTeam(exchanging, check_every_steps=1)
        if first:
            team.spread(trainer, {})
            for _ in range(2):
                trainer.step()
            held = team.held_back()
            if group.world.leader:
                CheckpointStore(path, keep=1).save(trainer.steps, {**trainer.state_tensors(), **held}, {}, trainer.state_facts())
        else:
            tensors: dict[str, Tensor] = {}
            if group.world.leader:
                found, _ = CheckpointStore(path, keep=1).latest()
                assert found is not None
                tensors = found.tensors
                trainer.load_state(tensors, found.facts)
            team.spread(trainer, tensors)
        before = [checksum(replica(trainer)), trainer.steps, checksum(exchanging.exchange.even_out().values())]
        trainer.step()
        team.agree(Decision(False, False, False), trainer)
        return {"before": before, "after": checksum(replica(trainer))}

    return scene


def differences(group: Group) -> list[str]:
    other = group.world.rank == 1
    said = [refusal(lambda: agree(group, {"[model]": "a", "text": "y" if other else "x"}))]
    weights = torch.ones(300)
    said.append(refusal(lambda: check_replicas(group, 7, [weights])))
    weights[299] += 1e-7 if other else 0.0
    return [*said, refusal(lambda: check_replicas(group, 7, [weights]))]


def infinite(group: Group) -> str:
    """Rank 1's weights are broken: its loss is NaN, and every rank must say so."""
    trainer, _ = trainer_of(group, "exact")
    if group.world.rank == 1:
        trainer.weights.fill_(float("nan"))
    return refusal(trainer.step)


def lost(group: Group) -> list[Any]:
    """Rank 1 dies inside its third step; the other hears of it in its exchange, and saves the second."""
    trainer, exchanging = trainer_of(group, "onebit")
    config, own_step = parse_config(RUN), trainer.engine.step

    def step(*arguments: Any) -> float:
        if group.world.rank == 1 and trainer.steps == 2:
            os.kill(os.getpid(), 9)
        return own_step(*arguments)

    trainer.engine.step = step  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        store, lines = CheckpointStore(Path(folder), keep=2), io.StringIO()
        evaluator = build_evaluator(trainer.recipe, trainer.data, EvalSection(batches=2), choose_device("cpu"), SystemClock(), group)
        console = Console(lines, SystemClock(), terminal=False)
        run = LoneRun(config, trainer, evaluator, store, console, SystemClock(), 10, GroupTeam(exchanging, check_every_steps=1))
        said = refusal(lambda: run.run(lambda: False))
        found, notes = store.latest()
        assert found is not None and not notes
        return [said, found.facts["trainer"]["steps"], bool(torch.equal(found.tensors["weights"], trainer.weights)), lines.getvalue()]


def bench(folder: Path) -> Scene:
    """Processes of `tscale bench parallel`."""

    def scene(group: Group) -> int:
        return parallel_rows.main(folder)

    return scene


def bench_job(folder: Path) -> Path:
    folder.mkdir()
    parser = argparse.ArgumentParser()
    bench_parallel.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["parallel", "--preset", "tiny", "--device", "cpu", "--steps", "8", "--evaluate-every", "4"])
    (folder / "job.json").write_text(json.dumps({**bench_parallel.job_of(arguments, folder).as_json(), "rows": arguments.rows}))
    return folder


class Plain(torch.nn.Module):
    """The reference model as torch's own modules are: loss of text and target."""

    def __init__(self, shape: ModelShape, weights: Tensor) -> None:
        super().__init__()
        store = Parameters(shape).load(weights)
        self.model = Model(shape, store, torch.zeros(shape.vocab))
        for name, view in store.views.items():
            view.grad = None
            self.register_parameter(name.replace(".", "_"), view)

    def forward(self, text: Tensor, target: Tensor) -> Tensor:
        loss, targets = self.model.loss(text, target)
        return loss / targets


def ddp(how: str, steps: int) -> Scene:
    def scene(group: Group) -> dict[str, Any]:
        recipe, data = make_recipe(), TokenData.open(DATA)
        shape = model_shape(recipe, data.vocab)
        plain = Plain(shape, start_weights(recipe, shape))
        wrapped = DistributedDataParallel(plain, bucket_cap_mb=0.5)
        state = OneBitState(plain.parameters(), per_row=[plain.get_parameter("embedding"), plain.get_parameter("final")])
        if how == "onebit":
            wrapped.register_comm_hook(state, onebit_hook)
        optimizer = torch.optim.Adam(plain.parameters(), lr=2e-3, betas=(0.9, 0.95))
        losses = []
        for step in range(steps):
            text, target = data.batch(1, group.world.data_key("alice"), step, 4, 16)
            optimizer.zero_grad()
            loss = wrapped(text, target)
            loss.backward()
            optimizer.step()
            losses.append(float(group.reduce(loss.detach().double().view(1), "mean")))
        weights = sum(p.numel() for p in plain.parameters())
        return {"losses": losses, "checksum": checksum([p.detach() for p in plain.parameters()]),
                "bytes_per_weight": state.sent_bytes / steps / weights, "buckets": len(state._buckets)}  # fmt: skip

    return scene


def main(data: str, out: str) -> None:
    global DATA
    DATA = Path(data)
    torch.set_num_threads(1)
    saved = Path(out).with_suffix(".saved")
    found: dict[str, Any] = {f"exact {n}": play(n, train("exact")) for n in (2, 3)}
    found |= {f"one process for {n}": play(1, one_process(n)) for n in (2, 3)}
    found |= {f"onebit {n}": play(n, train("onebit")) for n in (2, 3, 4)}
    found |= {f"conservation {n}": play(n, conservation) for n in (1, 3)}
    found["saved by 2"] = play(2, resume(saved, first=True))
    found |= {f"resumed by {n}": play(n, resume(saved, first=False)) for n in (1, 2, 3)}
    found["differences"] = play(3, differences)
    found["infinite"] = play(2, infinite)
    found["lost"] = play(2, lost)
    found |= {f"ddp {how}": play(2, ddp(how, 30)) for how in ("exact", "onebit")}
    folder = bench_job(Path(out).with_suffix(".bench"))
    found["bench"] = [*play(2, bench(folder), opened=False), json.loads((folder / "rows.json").read_text())]
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
