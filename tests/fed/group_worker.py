"""One process of a group of the tests: `python group_worker.py HOW STEPS DATA OUT [KEY=VALUE of the recipe's batch ...]`.

Trains the run of training_run.py on the processor with one-bit or exact gradients, then writes losses, checksum and bytes as JSON to
OUT.RANK.json and, from rank 0, its weights to OUT.safetensors.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import safetensors.torch
import torch
from training_run import BUDGET, make_recipe

from tscale_fed.assembly import build_trainer, model_shape, start_weights
from tscale_fed.data.token_data import TokenData
from tscale_fed.device import choose_device
from tscale_fed.parallel.agreement import check_replicas, checksum
from tscale_fed.parallel.exchange import Exchanging
from tscale_fed.parallel.group import Group
from tscale_fed.parallel.world import world_from
from tscale_net.ports import SystemClock


def main(how: str, steps: int, data_folder: str, out: str, *changes: str) -> None:
    torch.set_num_threads(1)
    world = world_from(os.environ)
    assert world is not None
    group = Group.open(world, torch.device("cpu"))
    data = TokenData.open(Path(data_folder))
    batch = {key: int(value) for key, value in (change.split("=") for change in changes)}
    recipe = make_recipe(batch=batch)
    exchanging = Exchanging(how, group)  # type: ignore[arg-type]
    trainer = build_trainer(
        recipe, data, choose_device("cpu"), start_weights(recipe, model_shape(recipe, data.vocab)), peer_id=world.data_key("alice"),
        budget_batches=BUDGET, clock=SystemClock(), exchanging=exchanging,
    )  # fmt: skip
    losses = [trainer.step().loss for _ in range(steps)]
    check_replicas(group, steps, (trainer.weights, trainer.optimizer.momentum, trainer.optimizer.moment_sums))
    facts = {
        "losses": losses, "checksum": checksum([trainer.weights]), "bytes": exchanging.exchange.bytes_per_step, "tokens": trainer.tokens,
        "parameters": trainer.weights.numel(),
    }  # fmt: skip
    Path(f"{out}.{world.rank}.json").write_text(json.dumps(facts))
    if world.leader:
        safetensors.torch.save_file({"weights": trainer.weights.detach()}, f"{out}.safetensors")
    group.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
