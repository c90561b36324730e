"""Which run this peer takes part in, and its text: the home's own, a new one, or one learned from the swarm.

Enters: the ground, the command line. Leaves: a `FoundRun`: manifest, data, and start weights if the run is created here.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import torch

from tscale_fed.assembly import prepare_data
from tscale_fed.config import Recipe, RunConfig
from tscale_fed.data.manifest import MANIFEST_FILE, DataRecipe
from tscale_fed.data.token_data import TokenData
from tscale_fed.ground import Ground
from tscale_fed.home_run import known_manifest, remember_manifest
from tscale_fed.new_run import check_same_data, check_same_settings, create_run, recipe_of
from tscale_fed.run_data import fetch_data, local_data, own_text
from tscale_net.errors import Refused
from tscale_peers.joining import learn_run, pumping
from tscale_peers.manifest import RunManifest

FOLDER_HEX = 16
"""Hex digits of the data's hash that name its folder."""
RUN_HEX = 12
"""Hex digits of the run id that people see."""
NOT_NOW = frozenset({"unreachable", "no-answer", "needs-id", "too-many", "duplicate-dial"})
"""Refusals of a dial that may pass: the peer is away or busy. All others say that the address is not what its user thinks."""


@dataclass(frozen=True, slots=True)
class FoundRun:
    """A run that this machine can train."""

    manifest: RunManifest
    recipe: Recipe
    data_recipe: DataRecipe
    data: TokenData
    start: torch.Tensor | None
    """Start weights of a run created here just now; None: from a checkpoint or from the swarm."""
    config: RunConfig
    """Local matters (evaluation, checkpoints, device): from the run file, or defaults."""


async def find_run(ground: Ground, config: RunConfig | None) -> FoundRun:
    """The run, which the transport states from now on. `config`: the run file, if one was given.

    Raises Refused with what to do if there is nothing to run, or if home, run file and swarm do not fit together.
    """
    found = await _find(ground, config)
    ground.outside.transport.run = found.manifest.run_id
    return found


async def _find(ground: Ground, config: RunConfig | None) -> FoundRun:
    known = known_manifest(ground.home)
    if known is not None:
        await _greet(ground, known)
    if config is not None:
        return await _from_config(ground, config, known)
    if known is None:
        known = await _learn(ground)
        remember_manifest(ground.home, known)
    return await _with_data(ground, known)


async def _greet(ground: Ground, known: RunManifest) -> None:
    """Dial the given addresses for a home that has its run already. Who does not answer is tried again while training goes on; an address
    that belongs to another run or another peer than its user thinks ends the start. Raises Refused naming it."""
    tries = [_try(ground, address, known) for address in ground.arguments.bootstrap]
    for refusal in await asyncio.gather(*tries):
        if refusal is not None:
            raise refusal


async def _try(ground: Ground, address: str, known: RunManifest) -> Refused | None:
    """What ends the start, or None."""
    try:
        await ground.outside.transport.dial(address)
    except Refused as refusal:
        if refusal.code in NOT_NOW:
            ground.console.warn(f"{address}: {refusal.detail} It is tried again later.")
            return None
        hint = f" This home ({ground.home.path}) holds run {known.name}: name another --home to join."
        return Refused(refusal.code, f"{address}: {refusal.detail}{hint if refusal.code == 'wrong-run' else ''}")
    return None


async def _from_config(ground: Ground, config: RunConfig, known: RunManifest | None) -> FoundRun:
    data_root = ground.arguments.data_dir or ground.home.data
    if known is not None:
        check_same_settings(known, config)

    def progress(done: int, total: int, _rate: float) -> None:
        ground.console.progress("text", done, total)

    data = await asyncio.to_thread(prepare_data, config.data, data_root, progress)
    start = None
    if known is not None:
        manifest = known
        check_same_data(manifest, config, data)
    else:
        manifest, start = await asyncio.to_thread(create_run, config, data, ground.identity.public_key, ground.clock.wall())
        remember_manifest(ground.home, manifest)
    recipe, data_recipe = recipe_of(manifest)
    return FoundRun(manifest, recipe, data_recipe, data, start, config)


async def _learn(ground: Ground) -> RunManifest:
    learned = await learn_run(ground.outside, ground.arguments.bootstrap)
    manifest = learned.manifest
    size = sum(t.rows * t.cols for t in manifest.tensors)
    run = f"run {manifest.name} ({manifest.run_id.hex()[:RUN_HEX]})"
    ground.console.say(f"{learned.address}  CURVE ok  {run}  {size / 1e6:.2f} million weights")
    return manifest


async def _with_data(ground: Ground, manifest: RunManifest) -> FoundRun:
    recipe, data_recipe = recipe_of(manifest)
    _check_data_dir(ground.arguments.data_dir)
    data = local_data(data_recipe, _folders(ground, data_recipe))
    if data is None:
        data = await _obtained(ground, data_recipe)
    return FoundRun(manifest, recipe, data_recipe, data, None, RunConfig())


async def _obtained(ground: Ground, recipe: DataRecipe) -> TokenData:
    """Own text from --data-dir, else the run's text from other peers."""
    console, outside, given = ground.console, ground.outside, ground.arguments.data_dir
    folder = _fetch_folder(ground, recipe)

    def progress(here: int, total: int) -> None:
        console.progress("text", here, total, sources=len(ground.linked()))

    async with pumping(outside):
        if not ground.linked():
            for address in ground.arguments.bootstrap:
                await outside.transport.dial(address)
        if given is not None and (given / MANIFEST_FILE).is_file():
            kept_in = folder.with_name(f"{folder.name}.counts")
            return await own_text(recipe, given, kept_in, outside.transfers, ground.linked, progress)
        return await fetch_data(recipe, folder, outside.transfers, ground.linked, progress)


def _check_data_dir(given: Path | None) -> None:
    """A joiner's --data-dir holds its own text, or a place for what is fetched. Raises Refused("data-dir") for a path that is not there."""
    if given is not None and not given.is_dir():
        fix = "`tscale data import` makes one, and without --data-dir the run's text is fetched"
        raise Refused("data-dir", f"--data-dir {given}: no such folder; {fix}")


def _fetch_folder(ground: Ground, recipe: DataRecipe) -> Path:
    """Below --data-dir, unless that is a data folder itself."""
    given: Path | None = ground.arguments.data_dir
    root = ground.home.data if given is None or (given / MANIFEST_FILE).is_file() else given
    return root / recipe.data.hash[:FOLDER_HEX]


def _folders(ground: Ground, recipe: DataRecipe) -> list[Path]:
    """Where the run's data may lie: --data-dir itself, a folder below it, or what an earlier start fetched or imported."""
    given: Path | None = ground.arguments.data_dir
    roots = [root for root in (given, ground.home.data) if root is not None]
    children = [child for root in roots if root.is_dir() for child in sorted(root.iterdir())]
    below = [child for child in children if child.is_dir() and not child.name.startswith(".")]
    return [*([given] if given is not None else []), _fetch_folder(ground, recipe), *below]
