"""Sampling: enters logits of the next tokens of several sequences, leaves one token for each.

Order: penalties, temperature, then top-k, top-p and min-p on what is left, all from the same probabilities. A token is drawn by one uniform
number per sequence and step, from the sequence's own generator: what its neighbours do cannot change it. The number picks along the
vocabulary, or along the sorted probabilities where some are cut off.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tscale_fed.inference.settings import Settings


@dataclass(slots=True)
class Draws:
    """What sampling remembers of one answer."""

    settings: Settings
    generator: random.Random
    prompt: frozenset[int] = frozenset()
    counts: dict[int, int] = field(default_factory=dict)
    """How often each token occurs in the answer."""

    def note(self, token: int) -> None:
        self.counts[token] = self.counts.get(token, 0) + 1

    @property
    def penalised(self) -> bool:
        s = self.settings
        return s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0


@torch.no_grad()
def sample(logits: Tensor, draws: Sequence[Draws]) -> Tensor:
    """int64 [S] tokens on the CPU for logits fp32 [S, V]; -inf: a token that never comes. Changes `logits` by the penalties."""
    for row, each in zip(logits, draws, strict=True):
        if each.penalised:
            _penalise(row, each)
    greedy = logits.argmax(-1)
    if all(each.settings.temperature == 0 for each in draws):
        return greedy.cpu()
    numbers = torch.tensor([each.generator.random() for each in draws], dtype=torch.float32, device=logits.device)
    temperature = torch.tensor([each.settings.temperature or 1.0 for each in draws], device=logits.device)
    probabilities = torch.softmax(logits / temperature[:, None], dim=-1)
    drawn = _cut_and_draw(probabilities, draws, numbers) if any(_is_cut(each.settings) for each in draws) else _draw(probabilities, numbers)
    still = torch.tensor([each.settings.temperature == 0 for each in draws], device=logits.device)
    return torch.where(still, greedy, drawn).cpu()


def _penalise(row: Tensor, each: Draws) -> None:
    settings = each.settings
    if settings.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(each.prompt | each.counts.keys()), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / settings.repetition_penalty, values * settings.repetition_penalty)
    if each.counts and (settings.presence_penalty or settings.frequency_penalty):
        tokens = torch.tensor(list(each.counts), device=row.device)
        counts = torch.tensor(list(each.counts.values()), dtype=row.dtype, device=row.device)
        row[tokens] -= settings.presence_penalty + settings.frequency_penalty * counts


def _is_cut(settings: Settings) -> bool:
    return settings.temperature > 0 and (settings.top_k > 0 or settings.top_p < 1 or settings.min_p > 0)


def _cut_and_draw(probabilities: Tensor, draws: Sequence[Draws], numbers: Tensor) -> Tensor:
    """Rows that are not cut draw as they would alone: along the vocabulary."""
    values, order = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(values.shape[1], device=values.device)
    largest = values.shape[1]
    top_k = torch.tensor([each.settings.top_k or largest for each in draws], device=values.device)
    top_p = torch.tensor([each.settings.top_p for each in draws], device=values.device)
    min_p = torch.tensor([each.settings.min_p for each in draws], device=values.device)
    before = values.cumsum(-1) - values
    kept = (rank < top_k[:, None]) & ((before < top_p[:, None]) | (top_p[:, None] >= 1)) & (values >= min_p[:, None] * values[:, :1])
    kept[:, 0] = True
    cut = order.gather(-1, _draw(values * kept, numbers)[:, None])[:, 0]
    uncut = torch.tensor([not _is_cut(each.settings) for each in draws], device=values.device)
    return torch.where(uncut, _draw(probabilities, numbers), cut)


def _draw(weights: Tensor, numbers: Tensor) -> Tensor:
    """The place where the sum of weights first exceeds number * total; never one of weight 0."""
    sums = weights.double().cumsum(-1)
    wanted = numbers.double()[:, None] * sums[:, -1:]
    found = torch.searchsorted(sums, wanted, right=True)[:, 0]
    last = (weights > 0).long().cumsum(-1).argmax(-1)  # rounding may lead beyond the last one
    return torch.minimum(found, last)


def log_probabilities(logits: Tensor, tokens: Tensor, alternatives: int) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Natural log probabilities of `tokens` [S] and of the likeliest `alternatives` under logits [S, V], temperature 1, no penalties."""
    logs = torch.log_softmax(logits.float(), dim=-1)
    own = logs.gather(-1, tokens.to(logs.device)[:, None])[:, 0].tolist()
    if alternatives == 0:
        return own, [[] for _ in own]
    values, places = logs.topk(min(alternatives, logs.shape[1]), dim=-1)
    return own, [list(zip(p, v, strict=True)) for p, v in zip(places.tolist(), values.tolist(), strict=True)]
