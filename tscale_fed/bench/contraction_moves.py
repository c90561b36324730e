"""What displacements grow by from publication to publication: drawn, or recorded while a model trains.

Enters: a number of intervals; for training a model. Leaves: `Moves`, one dictionary of matrices [rows, cols], fp32, per interval.
Noise: independent Gaussian values. Low rank: 8 random directions with four fifths of the energy in Gaussian noise, new ones in every move.
Training: what 5 steps of one peer did to every matrix but the embedding, most of whose rows do not move, on the demo's text.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tscale_fed.assembly import build_trainer, model_shape, prepare_data, start_weights
from tscale_fed.config import BatchSection, DataSection, ModelSection, OptimizerSection, RunConfig, RunSection, SwarmSection
from tscale_fed.device import choose_device
from tscale_net.ports import SystemClock

Moves = list[dict[str, Tensor]]
SHAPE = (512, 2048)
SIZE = 1e-3
"""Of drawn values: about that of five steps."""
DIRECTIONS, NOISE = 8, 0.5
EVERY_STEPS = 5
RATE = 0.04
SEED = 1


def noise_moves(intervals: int) -> Moves:
    """One matrix of independent Gaussian values per interval."""
    generator = torch.Generator().manual_seed(SEED)
    return [{"drawn": torch.randn(SHAPE, generator=generator) * SIZE} for _ in range(intervals)]


def low_rank_moves(intervals: int) -> Moves:
    """One matrix of low rank with noise per interval."""
    generator = torch.Generator().manual_seed(SEED)

    def draw() -> Tensor:
        left, right = torch.randn(SHAPE[0], DIRECTIONS, generator=generator), torch.randn(DIRECTIONS, SHAPE[1], generator=generator)
        return (left @ right * DIRECTIONS**-0.5 + NOISE * torch.randn(SHAPE, generator=generator)) * SIZE

    return [{"drawn": draw()} for _ in range(intervals)]


def training_moves(dims: str, first_steps: int, intervals: int) -> Moves:
    """Moves of one peer after `first_steps` steps. Raises Refused as training does."""
    steps = first_steps + EVERY_STEPS * intervals
    config = RunConfig(
        run=RunSection(name="contraction"),
        model=ModelSection(dims=dims),
        batch=BatchSection(fragments=4, length=128),
        optimizer=OptimizerSection(rate=RATE, warmup_batches=max(1, first_steps // 2)),
        swarm=SwarmSection(budget_batches=max(steps, 1)),
    )
    recipe, moves = config.recipe(), []
    with tempfile.TemporaryDirectory(prefix="tscale-bench-") as folder:
        data = prepare_data(DataSection(), Path(folder))
        shape = model_shape(recipe, data.vocab)
        start = start_weights(recipe, shape)
        budget = config.swarm.budget_batches
        trainer = build_trainer(recipe, data, choose_device("cpu"), start, peer_id="peer-0", budget_batches=budget, clock=SystemClock())
        for _ in range(first_steps):
            trainer.step()
        for _ in range(intervals):
            before = trainer.weights.clone()
            for _ in range(EVERY_STEPS):
                trainer.step()
            moves.append(_matrices(trainer.weights - before, shape.tensors()))
    return moves


def _matrices(flat: Tensor, tensors: list[tuple[str, int, int]]) -> dict[str, Tensor]:
    found, at = {}, 0
    for name, rows, cols in tensors:
        if name != "embedding":
            found[name] = flat[at : at + rows * cols].view(rows, cols)
        at += rows * cols
    return found
