"""How an answer is made: enters numbers and words from a command line or a request, leaves checked `Settings`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tscale_fed.inference import limits
from tscale_net.errors import Refused


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one answer. Raises Refused("bad-setting") naming the first value that cannot be."""

    new_tokens: int = limits.default_new_tokens
    temperature: float = 1.0
    """Logits are divided by it; 0: always the likeliest token."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities first reach this sum (nucleus sampling, Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Only tokens with at least this part of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Logits of tokens that occurred are divided by it where positive, else multiplied (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token of the answer so far."""
    frequency_penalty: float = 0.0
    """The same, times how often it occurred."""
    seed: int | None = None
    """Equal seeds give equal answers, whatever else is being decoded; None: a new one every time."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    log_probabilities: int | None = None
    """Report the probability of every token and of so many alternatives; None: report nothing."""
    ignore_end: bool = False
    """Go on where a document would end."""

    def __post_init__(self) -> None:
        for name, ok, wanted in (
            ("max_tokens", 0 <= self.new_tokens <= limits.new_tokens_max, f"a number of tokens up to {limits.new_tokens_max}"),
            ("temperature", 0 <= self.temperature <= 100, "0 to 100"),
            ("top_k", self.top_k >= 0, "a whole number, 0 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0, below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0, 1 for none"),
            ("presence_penalty", _within_two(self.presence_penalty), "-2 to 2"),
            ("frequency_penalty", _within_two(self.frequency_penalty), "-2 to 2"),
            ("seed", self.seed is None or 0 <= self.seed < 1 << 63, "a whole number from 0 to 2**63 - 1"),
            ("stop", len(self.stop) <= limits.stop_strings_max, f"at most {limits.stop_strings_max} strings"),
            (
                "stop",
                all(0 < len(s) <= limits.stop_characters_max for s in self.stop),
                f"1 to {limits.stop_characters_max} characters each",
            ),
            (
                "logprobs",
                self.log_probabilities is None or 0 <= self.log_probabilities <= limits.top_log_probabilities_max,
                f"0 to {limits.top_log_probabilities_max}",
            ),
        ):
            if not ok:
                raise Refused("bad-setting", f"{name} must be {wanted}")


def _within_two(value: float) -> bool:
    return math.isfinite(value) and -2 <= value <= 2
