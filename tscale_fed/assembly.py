"""Puts a run together: from recipe, data and device to shape, start weights, trainer and evaluator.

Enters: what config.py, data/ and device.py gave. Leaves: the parts that `tscale train` and a peer of a swarm share, so that both train the
same way. Whatever does not fit together is refused here with one sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from blake3 import blake3

from tscale_fed.config import DataSection, EvalSection, OptimizerSection, Recipe
from tscale_fed.data.importer import Progress, import_text
from tscale_fed.data.token_data import TokenData
from tscale_fed.data.tokenizer import load_tokenizer
from tscale_fed.device import Device, out_of_memory
from tscale_fed.engine.engine import Engine
from tscale_fed.engine.interface import TrainingEngine
from tscale_fed.engine.place import make_engine
from tscale_fed.engine.reference import ReferenceEngine
from tscale_fed.evaluate import Evaluator
from tscale_fed.model.forward import Model
from tscale_fed.model.init import initialise
from tscale_fed.model.loss import unigram_bias
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape, ShapeError
from tscale_fed.optimizer.rule import Optimizer, OptimizerSettings
from tscale_fed.parallel.exchange import Exchanging
from tscale_fed.parallel.group import Group
from tscale_fed.parallel.reference import GroupReferenceEngine
from tscale_fed.trainer import Trainer
from tscale_net.errors import Refused
from tscale_net.ports import Clock

FOLDER_NAME_DIGITS = 16
"""Hex digits of the hash that names an imported data folder."""


def prepare_data(section: DataSection, data_root: Path, progress: Progress | None = None) -> TokenData:
    """The token data of a run file's [data], imported below `data_root` unless an intact import of the same text is there already.

    Raises Refused with the importer's sentence: no such source, not text, too little of it, disk full.
    """
    tokenizer = load_tokenizer(section.tokenizer)
    name = blake3(repr((section.sources, tokenizer.hash, section.held_out)).encode()).hexdigest()[:FOLDER_NAME_DIGITS]
    folder = data_root / name
    import_text(section.sources, tokenizer, folder, section.held_out, progress)
    return TokenData.open(folder)


def model_shape(recipe: Recipe, vocab: int) -> ModelShape:
    """The shape of the recipe's model over a vocabulary. Raises Refused("bad-shape")."""
    try:
        return ModelShape.parse(recipe.model.dims, vocab, recipe.model.noise_rows)
    except ShapeError as error:
        raise Refused("bad-shape", str(error)) from None


def start_weights(recipe: Recipe, shape: ModelShape) -> torch.Tensor:
    """Float32 [parameters] on the CPU; a function of the recipe alone. Raises Refused("bad-shape") if memory cannot hold them."""
    try:
        return initialise(shape, recipe.seed)
    except (RuntimeError, MemoryError):
        size = f"{4 * shape.trained_parameters / 1e9:.0f} GB"
        raise Refused("bad-shape", f"model dims {recipe.model.dims}: {size} of weights do not fit this machine's memory") from None


def optimizer_settings(section: OptimizerSection) -> OptimizerSettings:
    """The optimizer's own form of [optimizer]. Raises Refused("bad-config")."""
    try:
        return OptimizerSettings(
            rate=section.rate,
            warmup_batches=section.warmup_batches,
            tail=section.tail or None,
            l2=section.l2,
            join_warmup_steps=section.join_warmup_steps,
        )
    except ValueError as error:
        raise Refused("bad-config", f"[optimizer]: {error}") from None


def build_trainer(
    recipe: Recipe,
    data: TokenData,
    device: Device,
    weights: torch.Tensor,
    *,
    peer_id: str,
    budget_batches: int,
    clock: Clock,
    say: Callable[[str], None] = lambda line: None,
    exchanging: Exchanging | None = None,
) -> Trainer:
    """A trainer at step 0 that starts from `weights` (float32 [parameters], copied). `say` gets lines about memory. `exchanging`: how the
    processes of a group share gradients, None for a lone process.

    Raises Refused: "bad-shape", "bad-config", "out-of-memory".
    """
    shape = model_shape(recipe, data.vocab)
    settings = optimizer_settings(recipe.optimizer)
    try:
        engine = _engine(recipe, data, device, shape, weights, settings, say, exchanging)
    except torch.OutOfMemoryError as error:
        what = f"a model of {shape.trained_parameters / 1e6:.0f} million weights and its optimizer"
        raise out_of_memory(device.torch_device, what) from error
    ranks = 1 if exchanging is None else exchanging.group.world.size
    return Trainer(engine, data, recipe, peer_id=peer_id, budget_batches=budget_batches, clock=clock, ranks=ranks)


def _engine(
    recipe: Recipe,
    data: TokenData,
    device: Device,
    shape: ModelShape,
    weights: torch.Tensor,
    settings: OptimizerSettings,
    say: Callable[[str], None],
    exchanging: Exchanging | None,
) -> TrainingEngine:
    """The engine over the kernels, or the autograd model where there are none."""
    memory = device.settings.optimizer_memory
    if exchanging is not None and memory == "host":
        detail = '[device] optimizer_memory = "host" does not go with several processes: write "device", or train with one'
        raise Refused("bad-config", detail)
    batch, micro_batch, bias2 = recipe.batch, device.settings.micro_batch, unigram_bias(torch.from_numpy(data.unigram_counts))
    if device.precision.kernels:
        return make_engine(
            shape, weights, bias2, device=device.torch_device, precision=device.precision, settings=settings,
            fragments=batch.fragments * batch.accumulate, tokens=batch.length, doc_start_token=data.doc_start_token,
            optimizer_memory=memory if exchanging is None else "device", micro_batch=micro_batch, say=say,
            engine_type=Engine if exchanging is None else exchanging.engine_type,
        )  # fmt: skip
    parameters = Parameters(shape, device.torch_device).load(weights)
    optimizer = Optimizer(parameters, settings)
    model = Model(shape, parameters, bias2, compute_dtype=device.precision.compute)
    fragments = micro_batch or batch.fragments
    if exchanging is None:
        return ReferenceEngine(model, optimizer, fragments=fragments, doc_start_token=data.doc_start_token, say=say)
    exchange = exchanging.over(parameters, optimizer)
    return GroupReferenceEngine(model, optimizer, exchange=exchange, fragments=fragments, doc_start_token=data.doc_start_token, say=say)


def build_evaluator(
    recipe: Recipe, data: TokenData, settings: EvalSection, device: Device, clock: Clock, group: Group | None = None
) -> Evaluator:
    """Measures losses of flat weights of this run, on the run's fragment length; a group deals the batches over its ranks."""
    return Evaluator(model_shape(recipe, data.vocab), data, settings, recipe.batch.length, device, clock, group)
