"""Creating a run: from a run file and its data to a manifest that others can join.

Enters: a checked `RunConfig`, token data, the creator's key. Leaves: the manifest, and the start weights on its grid.
"""

from __future__ import annotations

import msgspec
import torch

from tscale_fed.assembly import model_shape, start_weights
from tscale_fed.config import Recipe, RunConfig
from tscale_fed.data.manifest import DataRecipe
from tscale_fed.data.token_data import TokenData
from tscale_fed.model.shape import ModelShape
from tscale_net.errors import Refused
from tscale_peers.assembly import RunTerms
from tscale_peers.layout import TensorSpec
from tscale_peers.manifest import RuleSpec, RunLimits, RunManifest

UNIT_EXPONENT = -22
"""The grid of every matrix: 2.4e-7. A step of the swarm moves a weight by about rate * share = 1e-3 = 5000 units, so rounding a row's step
costs less than the bit; int32 then reaches +-256, where weights start at 0.5 and grow slowly. One unit for all: matrices that start at
zero need one too, and all of them move by the same absolute step."""

LARGEST_CHUNK, USUAL_CHUNK = 1 << 21, 1 << 20
LARGE_MODEL = 1 << 29
"""Weights from which chunks are as large as packets allow: what a packet costs its receiver hardly depends on its size, and such a model
still has some hundred chunks to share out between their owners."""
LEAST_CHUNK = 1 << 10
"""As manifests allow."""

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
    manifest = with_chunks(_manifest(config, data, shape, admin_key, created_unix), config.swarm.chunk_params)
    replica = RunTerms.of(manifest).new_replica()
    replica.set_start(start_weights(config.recipe(), shape))
    return msgspec.structs.replace(manifest, start_hash=replica.hash()), replica.weights()


def _manifest(config: RunConfig, data: TokenData, shape: ModelShape, admin_key: bytes, created_unix: float) -> RunManifest:
    """Not checked yet; its chunks and its start hash come later."""
    return RunManifest(
        name=config.run.name,
        tensors=tensor_specs(shape),
        start_hash=b"\x00" * 32,
        created_unix=created_unix,
        trainer={**config.recipe().to_manifest(), DATA_KEY: DataRecipe(data.manifest, config.data.served).to_plain()},
        codec=config.swarm.codec,
        sum_codec=config.swarm.sum_codec,
        spread=config.swarm.spread,
        codec_for=config.swarm.codec_for,
        publish_every_steps=config.swarm.publish_every_steps,
        budget_batches=config.swarm.budget_batches,
        rule=RuleSpec(config.swarm.share_scale, config.swarm.own_leak, config.swarm.momentum_keep),
        limits=RunLimits(displacement_max_age_batches=config.swarm.displacement_max_age_batches),
        admin_keys=[admin_key],
        average_window_s=config.swarm.average_window_s,
        average_cuts=config.swarm.average_cuts,
    )


def with_chunks(manifest: RunManifest, asked: int) -> RunManifest:
    """Checked, with chunks of `asked` weights; 0: of `usual_chunk`, halved until a packet fits into a message.

    Raises Refused("bad-manifest").
    """
    chunk = asked or usual_chunk(sum(tensor.size for tensor in manifest.tensors))
    widest = max(tensor.cols for tensor in manifest.tensors)
    refused: Refused | None = None
    while True:
        try:
            return msgspec.structs.replace(manifest, chunk_params=chunk).check()
        except Refused as error:
            refused = refused or error
        chunk //= 2
        if asked or chunk < max(LEAST_CHUNK, widest):
            raise refused


def usual_chunk(weights: int) -> int:
    """Weights of a chunk where nothing is asked for, in a model of so many."""
    return LARGEST_CHUNK if weights >= LARGE_MODEL else USUAL_CHUNK


def start_of(manifest: RunManifest, recipe: Recipe, vocab: int) -> torch.Tensor:
    """The start weights of a run that exists already, made anew: they follow from its recipe.

    Raises Refused("start-weights") if this machine makes others than the run's creator did.
    """
    replica = RunTerms.of(manifest).new_replica()
    replica.set_start(start_weights(recipe, model_shape(recipe, vocab)))
    if replica.hash() != manifest.start_hash:
        raise Refused(
            "start-weights",
            "this machine makes other start weights than the creator of the run did (another version of PyTorch?): "
            "name a peer that has the model with --bootstrap",
        )
    return replica.weights()


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


def check_same_settings(manifest: RunManifest, config: RunConfig) -> None:
    """A run file given for a home that already holds a run must describe that run, as far as that can be said before its text is read.

    Raises Refused("other-run") naming the section that differs.
    """
    trainer = {key: value for key, value in manifest.trainer.items() if key != DATA_KEY}
    wanted = config.recipe().to_manifest()
    swarm = config.swarm
    pairs = [
        ("[run] name", manifest.name, config.run.name),
        *((f"[{key}]" if key != "seed" else "[run] seed", trainer.get(key), wanted[key]) for key in wanted),
        *((f"[swarm] {key}", getattr(manifest, key), getattr(swarm, key)) for key in _SWARM_KEYS),
        ("[swarm] chunk_params", manifest.chunk_params, swarm.chunk_params or manifest.chunk_params),
        ("[swarm]", manifest.rule, RuleSpec(swarm.share_scale, swarm.own_leak, swarm.momentum_keep)),
        ("[swarm]", manifest.limits, RunLimits(displacement_max_age_batches=swarm.displacement_max_age_batches)),
    ]
    for place, known, stated in pairs:
        if known != stated:
            raise _other_run(place)


def check_same_data(manifest: RunManifest, config: RunConfig, data: TokenData) -> None:
    """The same for the text itself. Raises Refused("other-run")."""
    if manifest.trainer.get(DATA_KEY) != DataRecipe(data.manifest, config.data.served).to_plain():
        raise _other_run("[data]")


_SWARM_KEYS = (
    "codec", "sum_codec", "spread", "codec_for", "publish_every_steps", "budget_batches", "average_window_s",
    "average_cuts",
)  # fmt: skip


def _other_run(place: str) -> Refused:
    fix = "use another --home for a new run, or leave --config out"
    return Refused("other-run", f"the run file differs from the run that this home holds ({place}): {fix}")
