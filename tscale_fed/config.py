"""One TOML run file: what a run is made of.

Enters: the path of a file such as configs/demo-cpu.toml. Leaves: a frozen, checked `RunConfig`. Reading is strict: an unknown section or
key, a value of the wrong type or outside its bounds is refused with one sentence that names file, line, section and key, and says what to
write instead. Every key has its owner's section below, its default, its unit and, where it has bounds, their reason.

Sections [model], [data], [batch], [optimizer] and [swarm] describe the run and travel in its manifest, so all peers agree on them;
[eval], [checkpoint], [device] and [parallel] are the business of the machine that reads the file.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from tscale_fed.config_errors import Place, unknown_key, wrong_value
from tscale_net.errors import Refused
from tscale_peers.codec import codec_fault
from tscale_peers.layout import TENSOR_CLASSES

DEMO_SOURCE = "builtin:demo"
"""In [data] sources: the public-domain text that ships with the package."""

AtLeast1 = Annotated[int, Meta(ge=1)]
Fragments = Annotated[int, Meta(ge=1, le=1 << 16)]
"""Far above any real batch: a manifest from a stranger must not be able to ask for all memory."""
Seed = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
"""What every random generator here takes."""
Seconds = Annotated[float, Meta(ge=0.0)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A section of the file: immutable, unknown keys refused."""


class RunSection(Section, frozen=True):
    """[run]: which run this is."""

    name: Annotated[str, Meta(min_length=1, max_length=64)] = "run"
    """Shown to people; 1 to 64 characters."""
    seed: Seed = 1
    """Start weights and all batches follow from it."""


class ModelSection(Section, frozen=True):
    """[model]: the architecture."""

    dims: str = "e128h1d4w128"
    """TScale dims string: e = width (multiple of 128), h = heads of 128, d = depth, w = wide window in tokens, relu = FFN multiple."""
    token_drop: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Fraction of input tokens that are replaced by the 'unknown' row in training; 0 = off. (The original states the kept fraction.)"""
    noise_rows: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Rows of the trained input noise (+row -row at every position in training); 0 = off, the original uses 32."""


class DataSection(Section, frozen=True):
    """[data]: the text."""

    sources: Annotated[tuple[str, ...], Meta(min_length=1)] = (DEMO_SOURCE,)
    """Text files, jsonl files or folders, relative to the run file; "builtin:demo" is the text that ships with the package."""
    tokenizer: str = "bytes"
    """"bytes", "gpt2", or the path of a Hugging Face tokenizer.json, relative to the run file."""
    served: bool = True
    """Whether peers without this text get its shards from others; false: everybody brings text of their own."""
    held_out: Annotated[float, Meta(gt=0.0, lt=0.5)] = 0.05
    """Fraction of the documents kept for the test loss, never trained on."""


class BatchSection(Section, frozen=True):
    """[batch]: what one step of one peer reads."""

    fragments: Fragments = 16
    """Fragments per group; without the 8-bit engine a group goes through the device at once."""
    length: Annotated[int, Meta(ge=2, le=1 << 20)] = 128
    """Tokens per fragment; the first has no target, so 2 is the least."""
    accumulate: Fragments = 1
    """Groups per step: the gradient is summed over fragments * accumulate. What goes through the device at once is [device] micro_batch."""


class OptimizerSection(Section, frozen=True):
    """[optimizer]: TScale's update rule (momentum of the RMS-normalised gradient, steps of absolute size)."""

    rate: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.01
    """Step size: RMS change of every matrix per step, 0.2 to 1 times this. Measured best between 0.01 and 0.04 in swarms."""
    warmup_batches: AtLeast1 = 100
    """The rate rises linearly over this many batches of the whole swarm. (The original's "slow", 1000 there.)"""
    tail: Annotated[float, Meta(ge=0.0)] = 0.0
    """The rate falls to zero over the last 1/tail of the budget; 0 = constant. (Original: tail5 and tail25.)"""
    l2: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Decoupled weight decay per step, times the rate. (1 / the original's "reg".)"""
    join_warmup_steps: Annotated[int, Meta(ge=0)] = 20
    """A peer that joins late raises its own rate linearly over this many own steps, as its momentum starts at zero; 0 = off."""


class SwarmSection(Section, frozen=True):
    """[swarm]: what peers exchange, and when."""

    budget_batches: AtLeast1 = 10_000
    """Batches of all peers together that the rate schedule is laid out for; `tscale train` stops there."""
    publish_every_steps: AtLeast1 = 1
    """Own steps between two deltas at least; links and the time for exchanges make it more. Measured: short intervals beat precision."""
    codec: str = "sign"
    """How a delta is packed: "sign" = 1 bit per weight and one scale per row; docs/protocol.md lists the others."""
    codec_for: dict[str, str] = {}
    """Other codecs for some tensors: [swarm.codec_for] with the keys "embedding", "final" (output) and "matrix" (all others)."""
    sum_codec: str = ""
    """Codec of the sums that owners of chunks publish; empty = `codec`. With sparse deltas a denser one is worth its bytes."""
    spread: Literal["auto", "flood", "owners"] = "auto"
    """"flood": every delta goes to everybody. "owners": to the owner of each chunk, who publishes sums; traffic per peer then hardly grows
    with the swarm. "auto": owners from 8 peers up."""
    share_scale: Annotated[float, Meta(gt=0.0, le=2.0)] = 1.0
    """c = share_scale * share. At most 1; with own_leak = "one" and a top-k codec 2 is better (docs/learning.md)."""
    own_leak: Literal["share", "one"] = "share"
    """"share": sum rule (1 bit, short intervals). "one": averaging rule (long intervals)."""
    momentum_keep: Literal["share", "one"] = "share"
    """"share" belongs to the sum rule, "one" to the averaging rule."""
    chunk_params: Annotated[int, Meta(ge=0, le=1 << 21)] = 0
    """Weights per packet at most, from 1024; 0: as many as suit the model and fit into a message with its codec."""
    displacement_max_age_batches: AtLeast1 = 2000
    """A peer that comes back drops its unpublished work if the swarm has done more batches than this since."""
    average_window_s: Annotated[float, Meta(gt=0.0)] = 3600.0
    """The running average is the mean of the basepoint over windows of so many seconds, the same on all peers."""
    average_cuts: Annotated[int, Meta(ge=1, le=1024)] = 8
    """Basepoints in it."""


class EvalSection(Section, frozen=True):
    """[eval]: the fixed sets that losses are measured on."""

    every_s: Seconds = 60.0
    """Seconds between two evaluations; 0 = only at the end."""
    fragments: Fragments = 16
    """Fragments that go through the device at once."""
    batches: Fragments = 4
    """Fixed batches per set (train and test)."""
    average: Literal["auto", "on", "off"] = "auto"
    """Keep the running average of the basepoint here: 16 bytes per weight of the memory that has the basepoint. "auto": if that is free."""


class CheckpointSection(Section, frozen=True):
    """[checkpoint]: what survives a crash."""

    every_s: Seconds = 300.0
    """Seconds between two checkpoints; 0 = only at the end."""
    keep: AtLeast1 = 3
    """Newest checkpoints that are kept; 2 or more survive a damaged file."""


class DeviceSection(Section, frozen=True):
    """[device]: how this machine computes."""

    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Processor threads of the training thread; 0 = chosen from the number of cores."""
    precision: Literal["auto", "float32", "bfloat16", "int8", "fp8"] = "auto"
    """Of matrix products: "auto" is int8 on GPUs from Ampere on, float32 elsewhere. Weights stay float32."""
    attention: Literal["auto", "bfloat16", "int8", "fp8"] = "auto"
    """Of queries and keys where products are not float32: "auto" is bfloat16. "fp8" means values too."""
    optimizer_memory: Literal["auto", "device", "host"] = "auto"
    """Where weights and momentum are kept: on the device, or in the machine's memory ("host"), which leaves a GPU room for more."""
    swarm_memory: Literal["auto", "device", "host"] = "auto"
    """Where a peer of a swarm keeps the basepoint: beside the weights on the device, or in the machine's memory ("host": slower)."""
    micro_batch: Annotated[int, Meta(ge=0, le=1 << 16)] = 0
    """Fragments that go through the device at once; 0 = chosen from its free memory. It changes speed and memory, not the arithmetic."""


class ParallelSection(Section, frozen=True):
    """[parallel]: how the processes of one owner train together (--gpus N, torchrun)."""

    gradients: Literal["exact", "onebit"] = "exact"
    """How ranks share gradients: "exact" = their mean in float32, "onebit" = one bit per weight with error tails, for slow networks."""
    check_every_steps: AtLeast1 = 100
    """Steps between two checks that all ranks hold the same weights, bit for bit."""


class RunConfig(Section, frozen=True):
    """A whole run file."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    batch: BatchSection = BatchSection()
    optimizer: OptimizerSection = OptimizerSection()
    swarm: SwarmSection = SwarmSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    device: DeviceSection = DeviceSection()
    parallel: ParallelSection = ParallelSection()

    def recipe(self) -> Recipe:
        """What decides the training arithmetic: the part that a joiner learns from the manifest."""
        return Recipe(seed=self.run.seed, model=self.model, batch=self.batch, optimizer=self.optimizer)


class Recipe(Section, frozen=True):
    """What all peers of a run train with. (The data recipe is a separate part of the manifest: it lists shards.)"""

    seed: Seed
    model: ModelSection
    batch: BatchSection
    optimizer: OptimizerSection

    def to_manifest(self) -> dict[str, Any]:
        """Plain JSON values for the manifest's section `trainer`: keys seed, model, batch, optimizer."""
        return dict(msgspec.to_builtins(self))

    @staticmethod
    def from_manifest(trainer: dict[str, Any]) -> Recipe:
        """Read `to_manifest` back; the key "data" beside it is left to the reader of the data recipe.

        Raises Refused("bad-manifest"): the manifest may come from a stranger.
        """
        try:
            return msgspec.convert({key: value for key, value in trainer.items() if key != "data"}, Recipe)
        except msgspec.ValidationError as error:
            raise Refused("bad-manifest", f"run manifest, section trainer: {error}; update this program or ask for another run") from None


def load_config(path: Path | str) -> RunConfig:
    """Read and check a run file.

    Raises Refused("bad-config") with one sentence naming file, line, section and key, and the fix.
    """
    path = Path(path)
    return parse_config(_read(path), path)


def parse_config(text: str, path: Path | str = "run file") -> RunConfig:
    """Like load_config, for text already read; `path` is only named in errors and anchors relative sources.

    Raises Refused("bad-config").
    """
    path = Path(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Refused("bad-config", f"{path}: not valid TOML: {error}; strings need quotes, sections look like [model]") from None
    _refuse_unknown_keys(values, Place(str(path), text))
    try:
        config = msgspec.convert(values, RunConfig)
    except msgspec.ValidationError as error:
        raise wrong_value(str(error), Place(str(path), text), _choices) from None
    _refuse_contradictions(config, Place(str(path), text))
    return _anchored(config, path.parent)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Refused("bad-config", f"{path}: no such file; ready-made runs are in configs/, such as configs/demo-cpu.toml") from None
    except IsADirectoryError:
        raise Refused("bad-config", f"{path}: is a folder; name the .toml file in it") from None
    except UnicodeDecodeError:
        raise Refused("bad-config", f"{path}: is not UTF-8 text; a run file is TOML, see configs/demo-cpu.toml") from None
    except OSError as error:
        raise Refused("bad-config", f"{path}: cannot be read: {error.strerror}") from None


def _refuse_unknown_keys(values: dict[str, Any], place: Place) -> None:
    sections = {field.name: field.type for field in msgspec.structs.fields(RunConfig)}
    for section, content in values.items():
        if section not in sections:
            raise unknown_key(place, None, section, sorted(sections))
        if not isinstance(content, dict):
            raise Refused("bad-config", f"{place.of(None, section)}: is a section, write [{section}] on its own line")
        known = [field.name for field in msgspec.structs.fields(sections[section])]
        for key in content:
            if key not in known:
                raise unknown_key(place, section, key, known)


def _choices(section: str, key: str) -> tuple[str, ...]:
    """The words that may stand at a key of type Literal; empty for other keys."""
    sections = {field.name: field.type for field in msgspec.structs.fields(RunConfig)}
    types = {field.name: field.type for field in msgspec.structs.fields(sections[section])}
    return get_args(types[key]) if get_origin(types[key]) is Literal else ()


def _refuse_contradictions(config: RunConfig, place: Place) -> None:
    """Combinations that each key alone allows but that are known to train badly or not at all."""
    if (config.swarm.own_leak == "one") != (config.swarm.momentum_keep == "one"):
        where = place.of("swarm", "momentum_keep")
        raise Refused(
            "bad-config",
            f'{where}: own_leak and momentum_keep belong together: both "share" (sum rule, 1-bit deltas every few steps) '
            'or both "one" (averaging rule)',
        )
    codecs: list[tuple[str, str, str]] = [("swarm", "codec", config.swarm.codec)]
    codecs += [("swarm", "sum_codec", config.swarm.sum_codec)] if config.swarm.sum_codec else []
    codecs += [("swarm.codec_for", tensor_class, name) for tensor_class, name in config.swarm.codec_for.items()]
    for section, key, name in codecs:
        if section == "swarm.codec_for" and key not in TENSOR_CLASSES:
            raise unknown_key(place, section, key, TENSOR_CLASSES)
        fault = codec_fault(name)
        if fault is not None:
            raise Refused("bad-config", f"{place.of(section, key)}: {fault}")
    if config.optimizer.tail and config.optimizer.tail < 1:
        where = place.of("optimizer", "tail")
        raise Refused("bad-config", f"{where}: must be 0 (constant rate) or at least 1 (5 = the last fifth of the budget)")


def _anchored(config: RunConfig, folder: Path) -> RunConfig:
    """Sources and tokenizer files are meant relative to the run file, wherever the program is started."""
    sources = tuple(source if source == DEMO_SOURCE else str(folder / Path(source).expanduser()) for source in config.data.sources)
    tokenizer = config.data.tokenizer
    if tokenizer.endswith(".json"):
        tokenizer = str(folder / Path(tokenizer).expanduser())
    return msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, sources=sources, tokenizer=tokenizer))
