"""Continuous batching: answers that begin and end at any time are decoded together, one token each per step.

Enters: prompts with settings. Leaves: pieces of text, through each answer's `deliver`. One thread calls `step` and `add`; `cancel` may come
from any thread.

    waiting  ->  prefill, one answer at a time, a part of its prompt per step  ->  decoding, slots 0..k - 1 without a gap  ->  over
So a long prompt delays the others by one part at most, and a step reads the caches of those that decode and no other.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from tscale_fed.data.tokenizer import Tokenizer
from tscale_fed.inference import limits
from tscale_fed.inference.decoder import Decoder
from tscale_fed.inference.sampling import Draws, log_probabilities, sample
from tscale_fed.inference.settings import Settings
from tscale_fed.inference.text import Piecer

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenReport:
    """One token with its natural log probability, and alternatives (token, log probability), the likeliest first."""

    token: int
    log_probability: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step added to an answer."""

    text: str
    made: int = 0
    """Tokens of the answer so far."""
    reports: tuple[TokenReport, ...] = ()
    finish: Finish | None = None


@dataclass(eq=False, slots=True)
class Answer:
    """One answer in the making. `prompt`: token ids, at least one."""

    prompt: Sequence[int]
    settings: Settings
    deliver: Callable[[Piece], None]
    cancelled: bool = False
    made: int = 0
    """Tokens so far."""
    done: int = 0
    """Of the prompt."""
    last: int = 0
    draws: Draws = field(init=False)
    piecer: Piecer = field(init=False)


class Batch:
    """Over one decoder. `end_token`: what ends a document, and so an answer; `never`: tokens that are no text."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, seeds: random.Random) -> None:
        """seeds: for answers without a seed of their own."""
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._seeds = seeds
        self._waiting: deque[Answer] = deque()
        self._prefilling: Answer | None = None
        self._prefill_slot = 0
        self._decoding: list[Answer] = []
        self._end_token = tokenizer.doc_start
        self._never = torch.tensor([tokenizer.fragment_start], device=decoder.weights.device)
        self._never_end = torch.tensor([tokenizer.fragment_start, tokenizer.doc_start], device=decoder.weights.device)

    @property
    def busy(self) -> bool:
        """Is there anything to do?"""
        return bool(self._decoding or self._prefilling or self._waiting)

    @property
    def counts(self) -> tuple[int, int]:
        """(answers that wait for a slot, answers in a slot)."""
        return len(self._waiting), len(self._decoding) + (self._prefilling is not None)

    def add(self, prompt: Sequence[int], settings: Settings, deliver: Callable[[Piece], None]) -> Answer:
        """An answer to `prompt`, as soon as there is room."""
        answer = Answer(prompt, settings, deliver)
        seed = settings.seed if settings.seed is not None else self._seeds.getrandbits(63)
        answer.draws = Draws(settings, random.Random(seed), frozenset(prompt))
        answer.piecer = Piecer(self._tokenizer, settings.stop)
        self._waiting.append(answer)
        return answer

    def cancel(self, answer: Answer) -> None:
        """No more pieces; its slot is free at the next step."""
        answer.cancelled = True

    def step(self) -> None:
        """A part of a prompt, and a token for all that decode."""
        self._drop_cancelled()
        self._start_next()
        if self._prefilling is not None:
            self._prefill(self._prefilling)
        if self._decoding:
            tokens = torch.tensor([answer.last for answer in self._decoding])
            self._take(self._decoding[:], self._decoder.step(tokens))

    # -- from one state to the next ----------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        for answer in [a for a in self._decoding if a.cancelled]:
            self._end(answer)
        if self._prefilling is not None and self._prefilling.cancelled:
            self._decoder.cache.clear(self._prefill_slot)
            self._prefilling = None
        if any(a.cancelled for a in self._waiting):
            self._waiting = deque(a for a in self._waiting if not a.cancelled)

    def _start_next(self) -> None:
        if self._prefilling is None and self._waiting and len(self._decoding) < self._decoder.cache.slots:
            self._prefilling = self._waiting.popleft()
            self._prefill_slot = len(self._decoding)
            self._decoder.cache.clear(self._prefill_slot)

    def _prefill(self, answer: Answer) -> None:
        part = torch.tensor(answer.prompt[answer.done : answer.done + limits.prefill_tokens])
        logits = self._decoder.prefill(self._prefill_slot, part)
        answer.done += len(part)
        if answer.done < len(answer.prompt):
            return
        slot = len(self._decoding)
        if slot != self._prefill_slot:  # somebody has left meanwhile
            self._decoder.cache.move(self._prefill_slot, slot)
        self._prefilling = None
        self._decoding.append(answer)
        if answer.settings.new_tokens == 0:
            answer.deliver(Piece("", finish="length"))
            self._end(answer)
        else:
            self._take([answer], logits)

    def _take(self, answers: Sequence[Answer], logits: torch.Tensor) -> None:
        """Draw a token for each, and deliver what it adds."""
        wanted = [answer.settings.log_probabilities for answer in answers]
        kept = logits.clone() if any(each is not None for each in wanted) else None
        logits[:, self._never] = -torch.inf
        for row, answer in zip(logits, answers, strict=True):
            if answer.settings.ignore_end:
                row[self._never_end] = -torch.inf
        tokens = sample(logits, [answer.draws for answer in answers])
        reports: list[tuple[TokenReport, ...]] = [()] * len(answers)
        if kept is not None:
            own, others = log_probabilities(kept, tokens, max(each or 0 for each in wanted))
            reports = [
                () if count is None else (TokenReport(token, value, tuple(rest[:count])),)
                for token, value, rest, count in zip(tokens.tolist(), own, others, wanted, strict=True)
            ]
        for answer, token, report in zip(answers, tokens.tolist(), reports, strict=True):
            self._accept(answer, token, report)

    def _accept(self, answer: Answer, token: int, report: tuple[TokenReport, ...]) -> None:
        answer.made += 1
        answer.last = token
        answer.draws.note(token)
        ended = token == self._end_token
        text = "" if ended else answer.piecer.feed(token)
        finish: Finish | None = None
        if ended or answer.piecer.stopped:
            finish = "stop"
        elif answer.made >= answer.settings.new_tokens:
            finish = "length"
        if finish is not None:
            text += answer.piecer.finish()
            if answer.piecer.stopped:
                finish = "stop"
            self._end(answer)
        if text or report or finish is not None:
            answer.deliver(Piece(text, answer.made, report, finish))

    def _end(self, answer: Answer) -> None:
        """Its slot goes to the last one, so that no gap is left."""
        place, last = self._decoding.index(answer), len(self._decoding) - 1
        if place != last:
            self._decoder.cache.move(last, place)
            self._decoding[place] = self._decoding[last]
        else:
            self._decoder.cache.clear(last)
        self._decoding.pop()
