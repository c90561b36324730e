"""Everything to answer prompts in one process: enters an opened model and a device, leaves a `Batch` that decodes.

`tscale generate`, `tscale serve` and benches all start here, so they decode the same way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from tscale_fed.data.tokenizer import Tokenizer
from tscale_fed.inference.batch import Batch, Piece
from tscale_fed.inference.cache import Cache
from tscale_fed.inference.decoder import Decoder
from tscale_fed.inference.opened import OpenedModel
from tscale_fed.inference.settings import Settings
from tscale_fed.inference.weights import Format, prepare_weights


def default_format(device: torch.device) -> Format:
    """bfloat16 on a GPU; int8 on a processor, where reading weights takes most of the time."""
    return "bfloat16" if device.type == "cuda" else "int8"


def make_batch(model: OpenedModel, device: torch.device, kind: Format, slots: int, seeds: random.Random) -> Batch:
    """Decoding of up to `slots` answers at once. Raises torch.OutOfMemoryError, Refused("bad-model")."""
    weights = prepare_weights(model.shape, model.flat, model.bias, device, kind)
    return Batch(Decoder(weights, slots, model.tokenizer.doc_start), model.tokenizer, seeds)


def slot_bytes(model: OpenedModel, kind: Format) -> int:
    """Memory of one answer's keys and values."""
    return Cache.bytes_per_slot(model.shape, torch.float32 if kind == "float32" else torch.bfloat16)


def prompt_tokens(tokenizer: Tokenizer, text: bytes, document: bool) -> list[int]:
    """Ids of a prompt. document: it is the beginning of a document, and not a place inside one."""
    first = tokenizer.doc_start if document else tokenizer.fragment_start
    return [first, *tokenizer.encode(text).tolist()]


def answer_all(batch: Batch, prompts: Sequence[Sequence[int]], settings: Sequence[Settings], deliver: Callable[[int, Piece], None]) -> None:
    """Decode until every prompt has its answer; `deliver` gets the number of the prompt with every piece."""
    for number, (prompt, each) in enumerate(zip(prompts, settings, strict=True)):
        batch.add(prompt, each, lambda piece, number=number: deliver(number, piece))  # type: ignore[misc]
    while batch.busy:
        batch.step()
