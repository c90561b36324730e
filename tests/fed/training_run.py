"""A run small enough for tests: the smallest TScale model (two layers) on a few kilobytes of made-up text, seconds for dozens of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch

from tscale_fed.assembly import build_evaluator, build_trainer, model_shape, prepare_data, start_weights
from tscale_fed.config import DataSection, EvalSection, Recipe, parse_config
from tscale_fed.data.token_data import TokenData
from tscale_fed.device import choose_device
from tscale_fed.evaluate import Evaluator
from tscale_fed.trainer import Trainer
from tscale_net.ports import SystemClock

RUN = """
[run]
seed = 3
[model]
dims = "e128h1d2w16"
[batch]
fragments = 2
length = 16
[optimizer]
rate = 0.02
warmup_batches = 4
join_warmup_steps = 5
"""
BUDGET = 100


def make_recipe(**sections: dict[str, Any]) -> Recipe:
    """The recipe of RUN with changed keys: `make_recipe(model={"token_drop": 0.2})`."""
    recipe = parse_config(RUN).recipe()
    changed = {name: msgspec.structs.replace(getattr(recipe, name), **keys) for name, keys in sections.items()}
    return msgspec.structs.replace(recipe, **changed)


def make_data(folder: Path) -> TokenData:
    """About 6 kB of text that follows simple rules, so that a few steps lower the loss."""
    words = ["peer", "delta", "swarm", "token", "basepoint", "share"]
    lines = [f"the {words[i % 6]} of {words[(i * i + 1) % 6]} number {i}\n" for i in range(220)]
    source = folder / "text.txt"
    source.write_text("".join(lines))
    return prepare_data(DataSection(sources=(str(source),), held_out=0.2), folder / "data")


def make_trainer(data: TokenData, recipe: Recipe | None = None, peer_id: str = "alice") -> Trainer:
    torch.set_num_threads(1)
    recipe = recipe or make_recipe()
    weights = start_weights(recipe, model_shape(recipe, data.vocab))
    return build_trainer(recipe, data, choose_device("cpu"), weights, peer_id=peer_id, budget_batches=BUDGET, clock=SystemClock())


def make_evaluator(data: TokenData, recipe: Recipe | None = None) -> Evaluator:
    settings = EvalSection(fragments=2, batches=3)
    return build_evaluator(recipe or make_recipe(), data, settings, choose_device("cpu"), SystemClock())
