"""The original's central rule as a test oracle: one center, many workers, uncompressed messages, fp64, a common clock.

TScale's federated training has a center that keeps the model, and workers that send their whole displacement from the last basepoint:
    worker k, when a new basepoint B' with N merged batches arrives:
        W += B' - B            (the displacement d = W - B is kept)
        W -= s * f * q_old     f = n_old / N: its share of what it sent last is in B' now
        q = W - B'             packed AFTER the subtraction ("pack after": stable for 0 < s*f < 2)
        momentum *= f          send (q, n), n = batches since the last exchange
    center, when all have delivered:  Model += s * sum(n*q) / sum(n),  N = sum(n);  send Model
This follows the messages, with a center and its sums, on purpose: it shares no formula with the peer-to-peer rule that it judges. (The
original packs before it subtracts; that order oscillates for large shares, and its own simulator packs after.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class CentralWorker:
    """One worker. All tensors fp64 [n]."""

    weights: Tensor
    basepoint: Tensor
    sent: Tensor | None = None
    sent_batches: int = 0
    batches: int = 0
    momentum: float = 1.0
    """Product of all factors so far."""

    def train(self, move: Tensor, batches: int) -> None:
        self.weights = self.weights + move
        self.batches += batches

    def take(self, basepoint: Tensor, merged_batches: int, scale: float) -> None:
        """A new basepoint has arrived."""
        self.weights = self.weights + (basepoint - self.basepoint)
        self.basepoint = basepoint
        if self.sent is not None:
            share = self.sent_batches / merged_batches
            self.weights = self.weights - scale * share * self.sent
            self.momentum *= share

    def pack(self) -> tuple[Tensor, int]:
        """The displacement, and the batches since the last exchange."""
        self.sent, self.sent_batches, self.batches = self.weights - self.basepoint, self.batches, 0
        return self.sent, self.sent_batches


@dataclass
class CentralRule:
    """Center and workers in one process. `scale` is s."""

    model: Tensor
    workers: list[CentralWorker]
    scale: float
    merged_batches: int = 0
    _sum: Tensor = field(init=False)

    @staticmethod
    def start(weights: Tensor, workers: int, scale: float) -> CentralRule:
        return CentralRule(weights.clone(), [CentralWorker(weights.clone(), weights.clone()) for _ in range(workers)], scale)

    def round(self, moves: list[Tensor], batches: list[int]) -> None:
        """Everybody trains, takes the basepoint of the round before, packs; the center merges."""
        total = torch.zeros_like(self.model)
        merged = 0
        for worker, move, n in zip(self.workers, moves, batches, strict=True):
            worker.train(move, n)
            if self.merged_batches:
                worker.take(self.model, self.merged_batches, self.scale)
            packed, weight = worker.pack()
            total += weight * packed
            merged += weight
        self.model = self.model + self.scale * total / merged
        self.merged_batches = merged

    def displacements_after_merge(self) -> list[Tensor]:
        """What each worker will hold of its own once the newest basepoint has come: for comparing states of one moment."""
        assert all(w.sent is not None for w in self.workers)
        return [
            (w.weights - w.basepoint) - self.scale * (w.sent_batches / self.merged_batches) * w.sent  # type: ignore[operator]
            for w in self.workers
        ]
