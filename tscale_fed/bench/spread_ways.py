"""Ways to spread work among peers, on a model where all is known: least squares with noise in the gradients.

Enters: a way, an outer rule, the number of peers, a rate, a seed. Leaves: the mean loss of the common model over the second half of a run.

Every peer minimises the mean of curvature_j * w_j^2 / 2 from w = 1 by gradient steps with noise of its own; curvatures fall from 1 to
1 / CONDITION. All make STEPS steps, then exchange once, and so on: one interval. Codec: one bit per weight and a scale per row of ROW.

    sync     the mean of all gradients at every step: the bound
    flood    everybody's packet to everybody; it arrives one interval later:  B += sum of q_i / P,  d_i -= leak * q_i
    owners   everybody's packet to the owner of each chunk (one interval); the owner adds up, encodes its sum in one bit, keeps the error,
             and everybody adds that packet one interval later
    cells    the same, but the sum of each cell of CELL peers is encoded by itself
    pairs    random pairs replace each model by the mean of both, exchanged in 4 bits per weight; there is no common model

leak = 1 / P is the sum rule, leak = 1 the averaging rule. Weights are W_i = B + d_i all along; what a peer has given away and B does not
contain yet still counts as d_i, and is not encoded again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

DIMENSIONS, ROW = 512, 64
CONDITION = 50.0
STEPS = 5
NOISE = 1.0
CELL = 8
DELAY = {"flood": 1, "owners": 2, "cells": 2}
"""Intervals from encoding to the moment at which everybody adds it."""
WAYS = (("sync", ""), *((way, rule) for way in DELAY for rule in ("sum", "average")), ("pairs", ""))


@dataclass(frozen=True, slots=True)
class Way:
    """One way and its outer rule ("sum", "average", or "" where there is none)."""

    name: str
    rule: str
    peers: int
    rate: float


def loss_of(way: Way, intervals: int, seed: int) -> float:
    """Mean loss over the second half: of the basepoint; with pairs, of the peers' models."""
    rng = np.random.default_rng(seed)
    curvature = np.geomspace(1.0, 1.0 / CONDITION, DIMENSIONS)
    swarm = _Swarm(way, rng)
    losses = []
    for now in range(intervals):
        swarm.arrive(now)
        for _ in range(STEPS):
            noise = NOISE * rng.standard_normal((way.peers, DIMENSIONS), dtype=np.float32)
            swarm.move(way.rate * (curvature * swarm.weights() + noise))
        swarm.exchange(now)
        losses.append(float((curvature * swarm.models() ** 2).sum(1).mean() / 2))
    return float(np.mean(losses[intervals // 2 :]))


class _Swarm:
    """State of all peers: basepoint [DIMENSIONS], displacements [peers, DIMENSIONS], what is under way."""

    def __init__(self, way: Way, rng: np.random.Generator) -> None:
        self._way, self._rng = way, rng
        self._leak = 1.0 / way.peers if way.rule == "sum" else 1.0
        self._basepoint = np.ones(DIMENSIONS)
        self._d = np.zeros((way.peers, DIMENSIONS))
        self._given = np.zeros((way.peers, DIMENSIONS))
        """Part of d that is under way: d pays it when B has it."""
        self._sums = np.zeros((-(-way.peers // CELL) if way.name == "cells" else 1, DIMENSIONS))
        """What those who add up have received and no packet contains."""
        self._under_way: deque[tuple[int, np.ndarray, np.ndarray]] = deque()

    def weights(self) -> np.ndarray:
        return self._basepoint + self._d

    def models(self) -> np.ndarray:
        """What is evaluated, [models, DIMENSIONS]."""
        return self.weights() if self._way.name == "pairs" else self._basepoint[None]

    def move(self, steps: np.ndarray) -> None:
        if self._way.name == "sync":
            self._basepoint -= steps.mean(0)
        else:
            self._d -= steps

    def arrive(self, now: int) -> None:
        """B gains what is due, and d pays its part."""
        while self._under_way and self._under_way[0][0] <= now:
            _, packets, paid = self._under_way.popleft()
            self._basepoint += packets
            self._d -= paid
            self._given -= paid

    def exchange(self, now: int) -> None:
        if self._way.name == "pairs":
            self._average_pairs()
        elif self._way.name != "sync":
            signs = _one_bit(self._d - self._given)
            paid = signs * self._leak
            self._given += paid
            self._under_way.append((now + DELAY[self._way.name], self._packets(signs / self._way.peers), paid))

    def _packets(self, given: np.ndarray) -> np.ndarray:
        """What everybody adds for these contributions, together."""
        if self._way.name == "flood":
            return np.asarray(given.sum(0))
        self._sums += np.stack([cell.sum(0) for cell in np.array_split(given, len(self._sums))])
        packets = _one_bit(self._sums)
        self._sums -= packets
        return np.asarray(packets.sum(0))

    def _average_pairs(self) -> None:
        order = self._rng.permutation(self._way.peers)
        one, other = order[0 : self._way.peers - 1 : 2], order[1::2]
        sent = _four_bits(self._d)
        half = (sent[other] - sent[one]) / 2
        self._d[one] += half
        self._d[other] -= half


def _one_bit(values: np.ndarray) -> np.ndarray:
    rows = values.reshape(len(values), -1, ROW)
    return np.asarray(np.where(rows < 0, -1.0, 1.0) * np.abs(rows).mean(2, keepdims=True)).reshape(values.shape)


def _four_bits(values: np.ndarray) -> np.ndarray:
    rows = values.reshape(len(values), -1, ROW)
    unit = np.abs(rows).max(2, keepdims=True) / 7 + np.finfo(np.float64).tiny
    return np.asarray(np.round(rows / unit) * unit).reshape(values.shape)
