"""The text of the rules bench: bytes, the last part held out, positions that are the same in every row.

Enters: a file of text (plain, .xz or .gz). Leaves: where the fragments of every peer and step start; batches on the device. Fragments start
at random places, with the fragment-start token for their first byte, which is no target. Batch t of peer k follows from (seed, k, t) alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tscale_fed.bench.quality_text import Batch, read_bytes
from tscale_fed.model.loss import NO_TARGET, unigram_bias
from tscale_net.errors import Refused

BYTE_VALUES = 256
FRAGMENT_START = BYTE_VALUES
VOCAB = BYTE_VALUES + 1
HELD_OUT_BYTES = 2_000_000
HELD_OUT_PART = 10
"""Of a short text a tenth is held out."""
LEAST_BYTES = 100_000
HELD_OUT_SEED = 99
EVALUATED_AT_ONCE = 64
"""Fragments per batch of `held_out`."""
_SEEDS_APART = 1_000_003


@dataclass(frozen=True)
class RulesText:
    """See the module."""

    ids: Tensor
    """uint8 [bytes]."""
    train_bytes: int
    sha256: str

    @staticmethod
    def open(paths: Sequence[Path]) -> RulesText:
        """Read files, one after the other. Raises Refused: "no-text" if one cannot be read, "small-data" for less than some kilobytes."""
        raw = b"".join(read_bytes(path) for path in paths)
        if len(raw) < LEAST_BYTES:
            raise Refused("small-data", f"{paths[0]}: {len(raw)} bytes; a text of some 100 kilobytes at least is needed")
        held_out = min(HELD_OUT_BYTES, len(raw) // HELD_OUT_PART)
        ids = torch.from_numpy(np.frombuffer(raw, np.uint8).copy())
        return RulesText(ids, len(raw) - held_out, hashlib.sha256(raw).hexdigest())

    def to(self, device: torch.device) -> RulesText:
        return replace(self, ids=self.ids.to(device))

    def bias2(self) -> Tensor:
        """The model's fixed output bias, fp32 [VOCAB] on the CPU."""
        return unigram_bias(torch.bincount(self.ids[: self.train_bytes].cpu().int(), minlength=VOCAB))

    def positions(self, seed: int, peers: int, steps: int, fragments: int, tokens: int, own_parts: bool) -> Tensor:
        """int64 [peers, steps, fragments] on the CPU. `own_parts`: peer k's lie in the k-th of equal parts of the training text."""
        drawn = []
        for peer in range(peers):
            first, last = (self.train_bytes * peer // peers, self.train_bytes * (peer + 1) // peers) if own_parts else (0, self.train_bytes)
            generator = torch.Generator().manual_seed(seed * _SEEDS_APART + peer)
            drawn.append(first + torch.randint(last - first - tokens, (steps, fragments), generator=generator))
        return torch.stack(drawn)

    def batch(self, positions: Tensor, tokens: int) -> Batch:
        """(text, target) int64 [B, T] of fragments that start at `positions` [B], all on the text's device. Waits for nothing."""
        places = positions[:, None] + torch.arange(tokens + 1, device=positions.device)
        ids = self.ids[places].long()
        text, target = ids[:, :-1].clone(), ids[:, 1:].clone()
        text[:, 0] = FRAGMENT_START
        target[:, 0] = NO_TARGET
        return text, target

    def held_out_positions(self, fragments: int, tokens: int) -> Tensor:
        """int64 [fragments] on the CPU: fixed places of the held-out part; the first ones are the same for any number."""
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        room = len(self.ids) - self.train_bytes - tokens - 1
        return self.train_bytes + (torch.rand(fragments, generator=generator, dtype=torch.float64) * room).long()

    def held_out(self, fragments: int, tokens: int) -> list[Batch]:
        places = self.held_out_positions(fragments, tokens).to(self.ids.device)
        return [self.batch(part, tokens) for part in places.split(EVALUATED_AT_ONCE)]
