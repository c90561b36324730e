"""Creating a run: from a run file and its data to a manifest that others can join.

Enters: a checked `RunConfig`, token data, the creator's key. Leaves: the manifest, and the start weights on its grid.
"""

from __future__ import annotations

import msgspec
import torch
from tscale_net.errors import Refused
from tscale_peers.assembly import RunTerms
from tscale_peers.layout import TensorSpec
from tscale_peers.manifest import RuleSpec, RunLimits, RunManifest

from tscale_fed.assembly import model_shape, start_weights
from tscale_fed.config import Recipe, RunConfig
from tscale_fed.data.manifest import DataRecipe
from tscale_fed.data.token_data import TokenData
from tscale_fed.model.shape import ModelShape

UNIT_EXPONENT = -22
"""The grid of every matrix: 2.4e-7. A step of the swarm moves a weight by about rate * share = 1e-3 = 5000 units, so rounding a row's step
costs less than the bit; int32 then reaches +-256, where weights start at 0.5 and grow slowly. One unit for all: matrices that start at
zero need one too, and all of them move by the same absolute step."""

DATA_KEY = "data"
"""Section of the manifest's `trainer` that holds the data recipe; the rest is `Recipe`."""


def tensor_specs(shape: ModelShape) -> list[TensorSpec]:
    """The model's matrices as the swarm sees them, in canonical order."""
    return [TensorSpec(name, rows, columns, UNIT_EXPONENT) for name, rows, columns in shape.tensors()]


def create_run(config: RunConfig, data: TokenData, admin_key: bytes, created_unix: float) -> tuple[RunManifest, torch.Tensor]:
    """The manifest, and the start weights (fp32 flat, on the grid).

    Raises Refused: "bad-shape", "bad-manifest" naming what does not fit.
    """
    shape = model_shape(config.recipe(), data.vocab)
    manifest = RunManifest(
        name=config.run.name,
        tensors=tensor_specs(shape),
        start_hash=b"\x00" * 32,
        created_unix=created_unix,
        trainer={**config.recipe().to_manifest(), DATA_KEY: DataRecipe(data.manifest, config.data.served).to_plain()},
        codec=config.swarm.codec,
        chunk_params=config.swarm.chunk_params,
        publish_every_steps=config.swarm.publish_every_steps,
        budget_batches=config.swarm.budget_batches,
        rule=RuleSpec(config.swarm.share_scale, config.swarm.own_leak, config.swarm.momentum_keep),
        limits=RunLimits(displacement_max_age_batches=config.swarm.displacement_max_age_batches),
        admin_keys=[admin_key],
    ).check()
    replica = RunTerms.of(manifest).new_replica()
    replica.set_start(start_weights(config.recipe(), shape))
    return msgspec.structs.replace(manifest, start_hash=replica.hash()), replica.weights()


def recipe_of(manifest: RunManifest) -> tuple[Recipe, DataRecipe]:
    """Read the trainer section of a manifest that may come from a stranger.

    Raises Refused: "bad-manifest", "bad-data-recipe".
    """
    recipe = Recipe.from_manifest({key: value for key, value in manifest.trainer.items() if key != DATA_KEY})
    data = DataRecipe.from_plain(manifest.trainer.get(DATA_KEY))
    shape = model_shape(recipe, data.data.tokenizer.vocab)
    expected = [(spec.name, spec.rows, spec.cols) for spec in tensor_specs(shape)]
    if [(spec.name, spec.rows, spec.cols) for spec in manifest.tensors] != expected:
        raise Refused("bad-manifest", f"run manifest: its tensors are not those of its model {recipe.model.dims}; ask another peer")
    return recipe, data


def check_same_run(manifest: RunManifest, config: RunConfig, data: TokenData) -> None:
    """A run file given for a home that already holds a run must describe that run. Raises Refused("other-run") naming what differs."""
    wanted, _ = create_run(config, data, b"\x00" * 32, manifest.created_unix)
    for field in ("name", "trainer", "tensors", "codec", "chunk_params", "publish_every_steps", "budget_batches", "rule", "limits"):
        if getattr(wanted, field) != getattr(manifest, field):
            raise Refused(
                "other-run",
                f"the run file differs from the run that this home holds ({field}): use another --home for a new run, or leave --config out",
            )
