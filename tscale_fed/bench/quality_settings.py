"""One run of the quality bench in words: `int8/fp8 qtail rate=0.014 ema=0.99,0.998`.

Enters: text. Leaves: a `Setting`. First word: the arithmetic, `compiled` (bf16 torch.compile), `compiled32` (the same in fp32) or the
engine's PRECISION[/ATTENTION]. Second: the schedule, `qconst` (warm-up over 1000 steps, then constant; 2800 steps) or `qtail` (warm-up over
200, to 0 linearly over the second half; 1500 steps). Then any of:

    rate=0.01 warmup=N tail=NN steps=N   the schedule's numbers (tail: over the last 1/NN; tail=0: constant)
    noise=32 keep=0.9                    noise rows, share of tokens that is kept
    order=random|epoch                   how fragments are drawn (quality_text.py)
    ema=0.99,0.998 mean=200              weights averaged over steps: exponentially, or evenly over the last N; evaluated beside the last
    mix=0.8 gap=0.5 l2=0                 share of momentum in a step (the gradient has the rest), 1 - beta at the start, weight decay
    seed=1
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tscale_fed.bench.flat_rule import RuleNumbers
from tscale_fed.bench.quality_text import Order
from tscale_fed.optimizer.rule import BETA_GAP, MOMENTUM_WEIGHT, OptimizerSettings
from tscale_net.errors import Refused

ScheduleName = Literal["qconst", "qtail"]
SCHEDULES: dict[str, dict[str, Any]] = {
    "qconst": dict(warmup=1000, tail=0.0, steps=2800),
    "qtail": dict(warmup=200, tail=2.0, steps=1500),
}
COMPILED, COMPILED32 = "compiled", "compiled32"


@dataclass(frozen=True)
class Setting:
    """See the module."""

    arithmetic: str
    schedule: str
    rate: float = 0.01
    warmup: int = 0
    tail: float = 0.0
    steps: int = 0
    noise: int = 0
    keep: float = 1.0
    order: Order = "random"
    ema: tuple[float, ...] = ()
    mean: int = 0
    mix: float = MOMENTUM_WEIGHT
    gap: float = BETA_GAP
    l2: float = 0.0
    seed: int = 1

    @staticmethod
    def parse(text: str) -> Setting:
        """Raises Refused("bad-bench") for words that mean nothing."""
        words = text.split()
        if len(words) < 2 or words[1] not in SCHEDULES:
            raise Refused("bad-bench", f"run '{text}': write for example 'int8/fp8 qtail rate=0.02'; schedules: {', '.join(SCHEDULES)}")
        values = dict(SCHEDULES[words[1]])
        for word in words[2:]:
            name, _, value = word.partition("=")
            if name not in _READERS:
                raise Refused("bad-bench", f"run '{text}': '{word}' is unknown; known are {', '.join(f'{n}=' for n in _READERS)}")
            try:
                values[name] = _READERS[name](value)
            except ValueError:
                raise Refused("bad-bench", f"run '{text}': '{value}' is no value of {name}") from None
        return Setting(words[0], words[1], **values)

    @property
    def name(self) -> str:
        """The words that make it, defaults left out."""
        usual = {field.name: field.default for field in dataclasses.fields(Setting)} | SCHEDULES[self.schedule]
        words = [self.arithmetic, self.schedule]
        for name in _READERS:
            value = getattr(self, name)
            if value != usual[name]:
                words.append(f"{name}={','.join(f'{v:g}' for v in value) if isinstance(value, tuple) else _number_text(value)}")
        return " ".join(words)

    @property
    def is_compiled(self) -> bool:
        return self.arithmetic in (COMPILED, COMPILED32)

    @property
    def optimizer(self) -> OptimizerSettings:
        return OptimizerSettings(rate=self.rate, warmup_batches=self.warmup, tail=self.tail or None, l2=self.l2)

    @property
    def rule(self) -> RuleNumbers:
        """Only the compiled baseline takes these."""
        return RuleNumbers(self.mix, 1.0 - self.mix, self.gap, self.l2)


def _number_text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _order(text: str) -> str:
    if text not in ("random", "epoch"):
        raise ValueError(text)
    return text


def _decays(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if not all(0 < value < 1 for value in values):
        raise ValueError(text)
    return values


_READERS: dict[str, Callable[[str], Any]] = {
    "rate": float, "warmup": int, "tail": float, "steps": int, "noise": int, "keep": float, "order": _order, "ema": _decays, "mean": int,
    "mix": float, "gap": float, "l2": float, "seed": int,
}  # fmt: skip
