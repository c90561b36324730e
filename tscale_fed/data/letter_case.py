"""Upper and lower case as TScale's tokenizers know it: A-Z, and Russian А-Я with Ё. Everything else has no case.

One-to-one in both directions, so what is written in small letters with a mark "capital" before it comes back exactly.
"""

from __future__ import annotations

from typing import Literal

Case = Literal["lower", "capital", "mixed"]
"""No capital; only the first character; any later one."""

_CAPITALS = [*range(ord("A"), ord("Z") + 1), *range(0x410, 0x430), 0x401]
_SMALL = [*range(ord("a"), ord("z") + 1), *range(0x430, 0x450), 0x451]
LOWER_OF = {chr(capital): chr(small) for capital, small in zip(_CAPITALS, _SMALL, strict=True)}
UPPER_OF = {small: capital for capital, small in LOWER_OF.items()}


def case_of(word: str) -> Case:
    """The case of a word of at least one character."""
    if any(character in LOWER_OF for character in word[1:]):
        return "mixed"
    return "capital" if word[0] in LOWER_OF else "lower"


def with_small_first(word: str) -> str:
    return LOWER_OF.get(word[0], word[0]) + word[1:]


def with_capital_first(word: str) -> str:
    return UPPER_OF.get(word[0], word[0]) + word[1:]
