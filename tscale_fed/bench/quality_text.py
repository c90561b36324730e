"""The text of the quality bench on the device: byte ids, the original's split, fragments, evaluation batches.

Enters: a file (plain, .xz or .gz). Leaves: batches (text, target) int64 [B, T] on the device. The rules are the original's:
vocabulary = the distinct bytes in order, and one fragment-start token after them; the last 5 % are held out; a fragment at position o has
text[o : o+T] and target[o+1 : o+T+1]; text[0] is replaced by the start token and target[0] is -1.

Training fragments come in one of two orders:
    random  start positions drawn evenly, with replacement (the original's)
    epoch   the training part is cut into pieces of T bytes at a random phase, which are read in random order, each once; then anew
"""

from __future__ import annotations

import hashlib
import lzma
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tscale_fed.model.loss import unigram_bias
from tscale_net.errors import Refused

HELD_OUT = 0.05
EVALUATION_SEED = 20251124
MOST_BYTES = 1 << 30
Order = Literal["random", "epoch"]
Batch = tuple[Tensor, Tensor]

DICTIONARY_SHA256 = "f2b1bc22204b8c8b56f304dafc2c88b923b64c6dba085e646bb508808aa67ea1"
DICTIONARY_RECIPE = """the text that the original was measured with is built from three Debian packages:
    mkdir -p DIR/deb && cd DIR/deb && apt-get download dict-gcide dict-foldoc dict-jargon && cd -
    python3 shared/bench/dictionary_corpus.py DIR     (makes DIR/text.txt, 37,988,049 bytes)
    xz -9k DIR/text.txt                               (optional: this bench reads .xz too)"""


@dataclass(frozen=True)
class QualityText:
    """See the module."""

    ids: Tensor
    """uint8 [bytes] on the device."""
    vocab: int
    """The start token included; it is the last one."""
    train_bytes: int
    sha256: str

    @staticmethod
    def open(path: Path, device: torch.device) -> QualityText:
        """Read a file. Raises Refused("no-text") if it is missing or too large, "small-data" if nothing could be held out."""
        raw = read_bytes(path)
        data = np.frombuffer(raw, np.uint8)
        distinct = np.unique(data)
        if data.size < 4096 or distinct.size > 255:
            raise Refused("small-data", f"{path}: {data.size} bytes, {distinct.size} of them distinct; a text of some kilobytes is needed")
        ids = np.searchsorted(distinct, data).astype(np.uint8)
        held_out = int(np.float32(np.float32(data.size) * np.float32(HELD_OUT)))
        on_device = torch.from_numpy(ids).to(device)
        return QualityText(on_device, distinct.size + 1, data.size - held_out, hashlib.sha256(raw).hexdigest())

    def to(self, device: torch.device) -> QualityText:
        """The same on another device."""
        return replace(self, ids=self.ids.to(device))

    @property
    def is_dictionary(self) -> bool:
        """Whether losses can be set beside the original's."""
        return self.sha256 == DICTIONARY_SHA256

    def bias2(self) -> Tensor:
        """The model's fixed output bias, from the training part: fp32 [vocab] on the CPU."""
        counts = torch.bincount(self.ids[: self.train_bytes].cpu().int(), minlength=self.vocab)
        return unigram_bias(counts)

    def positions(self, order: Order, seed: int, steps: int, fragments: int, tokens: int) -> Tensor:
        """int64 [steps, fragments] on the device: where the training fragments of every step start."""
        generator = torch.Generator().manual_seed(seed)
        places, wanted = self.train_bytes - tokens, steps * fragments
        if order == "random":
            drawn = torch.randint(places, (wanted,), generator=generator)
        else:
            parts: list[Tensor] = []
            while sum(len(part) for part in parts) < wanted:
                phase = int(torch.randint(tokens, (1,), generator=generator))
                pieces = (places - 1 - phase) // tokens + 1
                parts.append(torch.randperm(pieces, generator=generator) * tokens + phase)
            drawn = torch.cat(parts)[:wanted]
        return drawn.view(steps, fragments).to(self.ids.device)

    def batch(self, positions: Tensor, tokens: int) -> Batch:
        """(text, target) int64 [B, T] of fragments that start at `positions` [B]."""
        places = positions[:, None] + torch.arange(tokens + 1, device=positions.device)
        ids = self.ids[places].long()
        text, target = ids[:, :-1].clone(), ids[:, 1:].clone()
        text[:, 0] = self.vocab - 1
        target[:, 0] = -1
        return text, target

    def evaluation(self, split: Literal["train", "test"], count: int, fragments: int, tokens: int) -> list[Batch]:
        """`count` fixed batches at random places of a part, the same in every run."""
        first, last = (0, self.train_bytes) if split == "train" else (self.train_bytes, len(self.ids))
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        drawn = first + torch.randint(last - first - tokens, (count, fragments), generator=generator)
        return [self.batch(row, tokens) for row in drawn.to(self.ids.device)]

    def whole_test(self, fragments: int, tokens: int) -> list[Batch]:
        """The held-out part cut into fragments, as many whole batches as there are."""
        starts = torch.arange(self.train_bytes, len(self.ids) - tokens - 1, tokens, device=self.ids.device)
        whole = len(starts) // fragments * fragments
        return [self.batch(row, tokens) for row in starts[:whole].view(-1, fragments)]


def read_bytes(path: Path) -> bytes:
    """A file's content, unpacked by its ending. Raises Refused("no-text")."""
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise Refused("no-text", f"{path} cannot be read ({error.strerror}); {DICTIONARY_RECIPE}") from None
    try:
        if path.suffix == ".xz":
            return lzma.LZMADecompressor().decompress(packed, MOST_BYTES)
        if path.suffix == ".gz":
            return zlib.decompressobj(wbits=31).decompress(packed, MOST_BYTES)
    except (lzma.LZMAError, zlib.error) as error:
        raise Refused("no-text", f"{path} cannot be unpacked: {error}") from None
    return packed
