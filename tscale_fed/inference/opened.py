"""A model to use: enters the name of a home, a run or a checkpoint folder; leaves weights, tokenizer and output bias.

MODEL may be
    a home of `tscale-peer`                    its newest checkpoint: the swarm's basepoint and this peer's own training since
    a home of `tscale train` (or its parent, if it holds one run)
    a folder checkpoint-NNN, or `best` of a home
What belongs to the weights (sizes, tokenizer, unigram counts) is in the run's manifest, or in the checkpoint, and in the home's data
folder. Nothing is read into memory before names, sizes and hashes of what describes it are right; a peer may be training meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from tscale_fed.assembly import model_shape
from tscale_fed.checkpoint import STATE_FILE, TENSORS_FILE, CheckpointStore, read_facts, read_tensor
from tscale_fed.config import Recipe
from tscale_fed.data.manifest import UNIGRAMS_FILE, TokenizerRecord, read_manifest
from tscale_fed.data.token_data import read_unigrams
from tscale_fed.data.tokenizer import Tokenizer, open_recorded_tokenizer
from tscale_fed.home import Home
from tscale_fed.home_run import known_manifest
from tscale_fed.lone_run import KIND
from tscale_fed.model.loss import unigram_bias
from tscale_fed.model.shape import ModelShape
from tscale_fed.new_run import recipe_of
from tscale_net.errors import Refused

LONE_FOLDER = "alone"
"""In a home: runs of `tscale train`."""
BEST_FOLDER = "best"
_DATA_DEPTH = 3
"""Folders below a home's data folder that are looked into."""


@dataclass(frozen=True)
class OpenedModel:
    """A model on the CPU. `flat` fp32 [parameters], mapped or in memory; `bias` fp32 [V] in natural units."""

    name: str
    checkpoint: Path
    step: int
    shape: ModelShape
    recipe: Recipe
    flat: Tensor
    bias: Tensor
    tokenizer: Tokenizer

    @property
    def window(self) -> int:
        """Tokens that the widest layer looks back."""
        return max(width for width, _ in self.shape.layers())


@dataclass(frozen=True)
class _Description:
    name: str
    recipe: Recipe
    tokenizer: TokenizerRecord
    data: Path
    """Folder with the unigram counts, and the tokenizer if it is a file."""


def open_model(place: Path, best: bool = False) -> OpenedModel:
    """See the module. best: of a peer's home, the weights with the lowest held-out loss that it has measured.

    Raises Refused: "no-model" (nothing there, or several), "damaged-checkpoint", "wrong-tokenizer", "bad-data", "bad-shape".
    """
    checkpoint = newest_checkpoint(place, best)
    facts = read_facts(checkpoint)
    home = Home(checkpoint.parent.parent)
    described = _lone(home, facts) if facts.get("kind") == KIND else _of_swarm(home, facts)
    shape = model_shape(described.recipe, described.tokenizer.vocab)
    tokenizer = open_recorded_tokenizer(described.tokenizer, described.data)
    counts = torch.from_numpy(read_unigrams(described.data / UNIGRAMS_FILE, described.tokenizer.vocab))
    flat = read_tensor(checkpoint, "weights", shape.trained_parameters)
    bias = unigram_bias(counts) * math.log(2.0)
    return OpenedModel(described.name, checkpoint, int(facts.get("own_steps", 0)), shape, described.recipe, flat, bias, tokenizer)


def newest_checkpoint(place: Path, best: bool = False) -> Path:
    """The checkpoint folder that MODEL means. Raises Refused("no-model")."""
    if not place.exists():
        raise Refused("no-model", f"{place}: no such file or folder; name a home, a run of `tscale train` or a checkpoint folder")
    if (place / STATE_FILE).is_file():
        return place
    if not place.is_dir():
        raise Refused("no-model", f"{place} is a file, not a model: name a home, a run of `tscale train` or a checkpoint folder")
    if best:
        return _last(CheckpointStore(place / BEST_FOLDER, 1).paths(), f"{place}: no best model is kept there yet; leave --best out")
    found = CheckpointStore(place if place.name in (BEST_FOLDER, "checkpoints") else Home(place).checkpoints, 1).paths()
    runs = sorted(path for path in _folders(place / LONE_FOLDER) if CheckpointStore(Home(path).checkpoints, 1).paths())
    if found:
        return found[-1]
    if len(runs) == 1:
        return CheckpointStore(Home(runs[0]).checkpoints, 1).paths()[-1]
    if runs:
        names = ", ".join(path.name for path in runs)
        raise Refused("no-model", f"{place} holds several runs ({names}): name one, such as {runs[0]}")
    raise Refused("no-model", f"{place} holds no checkpoint ({TENSORS_FILE} and {STATE_FILE} in a folder checkpoint-…): train first")


def _last(paths: list[Path], sentence: str) -> Path:
    if not paths:
        raise Refused("no-model", sentence)
    return paths[-1]


def _folders(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.is_dir()] if place.is_dir() else []


def _lone(home: Home, facts: dict[str, Any]) -> _Description:
    recipe = Recipe.from_manifest(facts["recipe"])
    for folder in _data_folders(home):
        try:
            manifest = read_manifest(folder)
        except Refused:
            continue
        if manifest.hash == facts["data"]:
            return _Description(home.path.name, recipe, manifest.tokenizer, folder)
    raise Refused(
        "no-model", f"{home.data}: the text that {home.path} was trained on is not there; it has the tokenizer and the token counts"
    )


def _of_swarm(home: Home, facts: dict[str, Any]) -> _Description:
    manifest = known_manifest(home)
    if manifest is None or facts.get("run") != manifest.run_id.hex():
        raise Refused("no-model", f"{home.path} does not hold the run of its checkpoint: name the home that the checkpoint was written in")
    recipe, data = recipe_of(manifest)
    wanted = data.data.vocabulary_files()
    for folder in _data_folders(home):
        if all(_is(folder / file.name, file.size, file.hash) for file in wanted):
            return _Description(manifest.name, recipe, data.data.tokenizer, folder)
    raise Refused("no-model", f"{home.data}: the run's token counts are not there; start the peer once with this home to fetch them")


def _data_folders(home: Home) -> Iterable[Path]:
    """Folders with unigram counts; the shallow ones first."""
    level = [home.data]
    for _ in range(_DATA_DEPTH):
        for folder in level:
            if (folder / UNIGRAMS_FILE).is_file():
                yield folder
        level = [inner for folder in level for inner in sorted(_folders(folder))]


def _is(path: Path, size: int, digest: str) -> bool:
    return path.is_file() and path.stat().st_size == size and blake3(path.read_bytes()).hexdigest() == digest
