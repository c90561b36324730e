"""Golden file: enters a path to an .npz printed by another implementation, leaves its contents with every shape checked.

Layout, with B fragments of T tokens, V tokens in the vocabulary, K labels per position, S optimizer steps:
    init/<matrix>, after/<matrix>   fp32 weights before the first and after the last step; names as in `ModelShape.tensors`
    text, target    [B, T] int (the same batch for every step) or [S, B, T]; target -1 = no target. Flat forms of the same length are
                    taken too
    train_label     [S, B*T, K] embedding rows of every position and step (token drop and noise are in them)
    train_sign      likewise, +1, -1 or 0
    pred            [B, T, V] probabilities that the start weights give, without drop and noise
    bias            [V] output bias in base-2 units
    meta            JSON: model_dims, vocab, frag_len, steps, drop_config, doc_start_token, max_iters, noise_rows
`drop_config` is the original's string of letters and numbers, as in drop0.9ch1lr0.02slow2reg200tail5: token keep-probability (already in
the labels), channel keep-probability (must be 1), rate, warm-up batches, L2 = 1/reg, tail.
"""

import json
import math
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tscale_fed.model.shape import ModelShape, ShapeError
from tscale_fed.optimizer.rule import OptimizerSettings
from tscale_net.errors import Refused

_PART = re.compile(r"([a-z]+)([0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_DROP_DEFAULTS = {"drop": 1.0, "ch": 1.0, "lr": 0.01, "slow": 1000.0}
"""What the original takes for letters that are not given; reg and tail are off."""
_DROP_LETTERS = (*_DROP_DEFAULTS, "reg", "tail")
_MOST_STEPS = 1000
"""More would be a wrong number: after a few steps rounding alone separates two implementations."""


class BadGoldenFile(Refused):
    """The file cannot be used; the message is one sentence."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__("bad-golden-file", f"{path}: {why}")


@dataclass(frozen=True)
class Golden:
    """A golden file, ready to be run. Tensors are on the CPU; per-step tensors have S in front."""

    shape: ModelShape
    settings: OptimizerSettings
    steps: int
    budget_batches: int
    doc_start_token: int | None
    init: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    text: torch.Tensor
    """int64 [S, B, T]"""
    target: torch.Tensor
    """int64 [S, B, T]"""
    labels: torch.Tensor
    """int64 [S, B, T, K]"""
    signs: torch.Tensor
    """fp32 [S, B, T, K]"""
    predicted: torch.Tensor
    """fp32 [N, B, T, V] for the first N = 1 or S batches"""
    bias2: torch.Tensor


def read_golden(path: Path) -> Golden:
    """Read and check a golden file. Raises BadGoldenFile, or OSError when the file cannot be opened."""
    arrays = _read_arrays(path)
    try:
        return _golden(arrays)
    except (_Wrong, ShapeError) as wrong:
        raise BadGoldenFile(path, str(wrong)) from wrong


class _Wrong(ValueError):
    """What is wrong with the contents; `read_golden` puts the path in front."""


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise BadGoldenFile(path, "this is one array, not an .npz file of several; give the file that the reference printed")
            return {name: archive[name] for name in archive.files}
        except (ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, zlib.error) as error:
            raise BadGoldenFile(path, "this is not a readable .npz file of plain arrays; it may be cut short or of another kind") from error


def _golden(arrays: dict[str, np.ndarray]) -> Golden:
    meta = _meta(_array(arrays, "meta"))
    steps = _whole(meta, "steps", 1, _MOST_STEPS)
    shape = _shape(meta, _array(arrays, "init/embedding"))
    text = _integers(arrays, "text")
    length = _whole(meta, "frag_len", 1, text.size) if "frag_len" in meta else text.shape[-1]
    label_array = _integers(arrays, "train_label")
    if label_array.ndim < 2 or label_array.size == 0:
        raise _Wrong(f"train_label has shape {label_array.shape}; expected [steps, tokens, labels]")
    kinds = label_array.shape[-1]
    positions = label_array.size // (kinds * steps)
    if positions * kinds * steps != label_array.size or positions % length:
        raise _Wrong(f"train_label of shape {label_array.shape} does not hold {steps} step(s) of whole fragments of {length} tokens")
    fragments = positions // length
    batch = (steps, fragments, length)
    signs = _reshaped(_array(arrays, "train_sign"), "train_sign", (*batch, kinds))
    return Golden(
        shape=shape,
        settings=drop_config(str(meta.get("drop_config", ""))),
        steps=steps,
        budget_batches=_whole(meta, "max_iters", 1, 2**53) if "max_iters" in meta else steps,
        doc_start_token=_doc_start_token(meta),
        init=_matrices(arrays, "init", shape),
        after=_matrices(arrays, "after", shape),
        text=_in_range(_per_step(text, "text", batch), "text", 0, shape.vocab),
        target=_in_range(_per_step(_integers(arrays, "target"), "target", batch), "target", -1, shape.vocab),
        labels=_in_range(_reshaped(label_array, "train_label", (*batch, kinds)).long(), "train_label", 0, shape.embedding_rows),
        signs=_finite(signs.float(), "train_sign"),
        predicted=_predictions(_array(arrays, "pred"), batch, shape.vocab),
        bias2=_finite(_reshaped(_array(arrays, "bias"), "bias", (shape.vocab,)).float(), "bias"),
    )


def drop_config(text: str) -> OptimizerSettings:
    """Optimizer settings of the original's drop_config string. Raises ValueError with one sentence."""
    values: dict[str, float] = dict(_DROP_DEFAULTS)
    at = 0
    while at < len(text):
        part = _PART.match(text, at)
        if part is None or part.group(1) not in _DROP_LETTERS:
            raise _Wrong(f"drop_config {text!r}: not understood at {text[at:]!r}; known are {', '.join(_DROP_LETTERS)}, each with a number")
        values[part.group(1)] = float(part.group(2))
        at = part.end()
    if values["ch"] != 1.0:
        raise _Wrong(f"drop_config {text!r}: channel drop (ch below 1) is not part of this model; print a file with ch1")
    if values.get("reg") == 0.0:
        raise _Wrong(f"drop_config {text!r}: reg0 would be endless decay (L2 = 1/reg); leave reg out for none")
    try:
        return OptimizerSettings(
            rate=values["lr"],
            warmup_batches=math.ceil(values["slow"]),
            tail=values.get("tail"),
            l2=1.0 / values["reg"] if "reg" in values else 0.0,
        )
    except ValueError as error:
        raise _Wrong(f"drop_config {text!r}: {error}") from error


def _array(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        raise _Wrong(f"{name!r} is missing; a golden file has init/*, after/*, text, target, train_label, train_sign, pred, bias and meta")
    return arrays[name]


def _integers(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    array = _array(arrays, name)
    if array.dtype.kind not in "iu" or array.ndim == 0:
        raise _Wrong(f"{name!r} has dtype {array.dtype} and shape {array.shape}; whole numbers are expected")
    return array


def _meta(array: np.ndarray) -> dict[str, Any]:
    raw = array.tobytes() if array.dtype == np.uint8 else array.item() if array.size == 1 else ""
    try:
        meta = json.loads(raw)
    except (ValueError, TypeError) as error:
        raise _Wrong("'meta' is not JSON text") from error
    if not isinstance(meta, dict):
        raise _Wrong("'meta' is not a JSON object")
    for name in ("model_dims", "vocab", "steps"):
        if name not in meta:
            raise _Wrong(f"'meta' lacks {name!r}")
    return meta


def _whole(meta: dict[str, Any], name: str, lowest: int, highest: int) -> int:
    value = meta[name]
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise _Wrong(f"'meta' has {name} = {value!r}; expected a whole number from {lowest} to {highest}")
    return value


def _doc_start_token(meta: dict[str, Any]) -> int | None:
    """None, or a negative number, says that documents are not told apart."""
    value = meta.get("doc_start_token")
    if value is None:
        return None
    token = _whole(meta, "doc_start_token", -1, 2**31)
    return token if token >= 0 else None


def _shape(meta: dict[str, Any], embedding: np.ndarray) -> ModelShape:
    vocab = _whole(meta, "vocab", 1, 2**31)
    rows = embedding.shape[0] if embedding.ndim == 2 else 0
    noise_rows = _whole(meta, "noise_rows", 0, 2**31) if "noise_rows" in meta else max(0, rows - 1 - vocab)
    shape = ModelShape.parse(str(meta["model_dims"]), vocab, noise_rows)
    if rows != shape.embedding_rows:
        raise _Wrong(
            f"init/embedding has {rows} rows; {noise_rows} noise rows, one dropped-token row and {vocab} tokens make {shape.embedding_rows}"
        )
    return shape


def _matrices(arrays: dict[str, np.ndarray], group: str, shape: ModelShape) -> dict[str, torch.Tensor]:
    matrices = {}
    for name, rows, columns in shape.tensors():
        array = _array(arrays, f"{group}/{name}")
        if array.shape != (rows, columns) or array.dtype.kind != "f":
            raise _Wrong(f"{group}/{name} is {array.dtype} of shape {array.shape}; model {shape.dims} needs floats of ({rows}, {columns})")
        matrices[name] = _finite(torch.from_numpy(array.astype(np.float32)), f"{group}/{name}")
    known = {f"{group}/{name}" for name in matrices}
    extra = sorted(name for name in arrays if name.startswith(f"{group}/") and name not in known)
    if extra:
        raise _Wrong(f"{extra[0]!r} is not a matrix of model {shape.dims}; check model_dims in meta")
    return matrices


def _reshaped(array: np.ndarray, name: str, wanted: tuple[int, ...]) -> torch.Tensor:
    if array.dtype.kind not in "iuf" or array.size != math.prod(wanted):
        raise _Wrong(f"{name!r} is {array.dtype} of shape {array.shape}; numbers of shape {list(wanted)} are expected")
    native = array.astype(np.int64 if array.dtype.kind in "iu" else np.float64)
    return torch.from_numpy(np.ascontiguousarray(native)).reshape(wanted)


def _per_step(array: np.ndarray, name: str, batch: tuple[int, int, int]) -> torch.Tensor:
    """[S, B, T]; one batch is repeated for every step."""
    if array.size == math.prod(batch[1:]):
        return _reshaped(array, name, (1, *batch[1:])).expand(batch)
    return _reshaped(array, name, batch)


def _predictions(array: np.ndarray, batch: tuple[int, int, int], vocab: int) -> torch.Tensor:
    batches = 1 if array.size == math.prod(batch[1:]) * vocab else batch[0]
    return _reshaped(array, "pred", (batches, *batch[1:], vocab)).float()


def _in_range(values: torch.Tensor, name: str, lowest: int, stop: int) -> torch.Tensor:
    if values.numel() and not (lowest <= int(values.min()) and int(values.max()) < stop):
        raise _Wrong(f"{name!r} holds {int(values.min())} to {int(values.max())}; allowed are {lowest} to {stop - 1}")
    return values


def _finite(values: torch.Tensor, name: str) -> torch.Tensor:
    if not bool(torch.isfinite(values).all()):
        raise _Wrong(f"{name!r} holds numbers that are not finite")
    return values
