"""Numbers as people write and read them.

Enters: bytes, bytes per second, seconds, counts; or a rate in the user's words. Leaves: short text; or bytes per second.
Link rates are in bits per second with decimal prefixes, as internet providers state them; sizes are decimal bytes.
"""

from __future__ import annotations

import math
import re
import unicodedata

_PREFIXES = ("", "k", "M", "G", "T", "P")
_PREFIX_STEP = 1000.0
_BITS_PER_BYTE = 8
_MINUTE_S = 60
_HOUR_S = 3600
_DAY_S = 86400
_RATE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?P<prefix>[kKmMgG]?)(?P<unit>bit/s|bits/s|bps|bit|b|B/s|B)?")


def parse_rate(text: str) -> float:
    """`20M`, `20Mbit/s`, `20Mbps` (bits) or `2.5MB/s` (bytes, with a capital B) as bytes per second.

    Raises ValueError with one sentence that names the form wanted.
    """
    match = _RATE.fullmatch(text.strip())
    value = float(match["number"]) * _PREFIX_STEP ** _PREFIXES.index(_canonical_prefix(match["prefix"])) if match else 0.0
    if not match or not value > 0:
        raise ValueError(f"'{text}' is not a rate: write for example 20M (20 Mbit/s), 500k or 2.5MB/s")
    return value if (match["unit"] or "").startswith("B") else value / _BITS_PER_BYTE


def _canonical_prefix(letter: str) -> str:
    return "k" if letter in ("k", "K") else letter.upper()


def count_text(number: float) -> str:
    """41234 -> `41.2k`; below 1000 as it is."""
    return _scaled(number, "", digits_below=0)


def bytes_text(size_bytes: float) -> str:
    """1234567 -> `1.2 MB`."""
    return _scaled(size_bytes, "B", gap=" ", digits_below=0)


def rate_text(bytes_per_s: float) -> str:
    """11750000 -> `94 Mbit/s`."""
    return _scaled(bytes_per_s * _BITS_PER_BYTE, "bit/s", gap=" ", digits_below=0)


def _scaled(number: float, unit: str, *, gap: str = "", digits_below: int) -> str:
    if not math.isfinite(number):
        return f"?{gap}{unit}"
    power = 0
    while abs(number) >= _PREFIX_STEP - 0.5 and power < len(_PREFIXES) - 1:
        number /= _PREFIX_STEP
        power += 1
    digits = (1 if abs(number) < 100 - 0.05 else 0) if power else digits_below
    return f"{number:.{digits}f}{gap}{_PREFIXES[power]}{unit}"


def duration_text(seconds: float) -> str:
    """0.24 -> `0.2s`, 124 -> `2:04`, 8040 -> `2h14`, 180000 -> `2d02h`."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < _MINUTE_S - 0.05:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < _HOUR_S:
        return f"{whole // _MINUTE_S}:{whole % _MINUTE_S:02d}"
    if whole < _DAY_S:
        return f"{whole // _HOUR_S}h{whole % _HOUR_S // _MINUTE_S:02d}"
    return f"{whole // _DAY_S}d{whole % _DAY_S // _HOUR_S:02d}h"


def short_hex(text: str) -> str:
    """The first and last digits of a long hash: `9c1e…44`, or `-` if there is none."""
    if not text:
        return "-"
    return text if len(text) <= 9 else f"{text[:4]}…{text[-2:]}"


def plain(text: str, longest: int) -> str:
    """Text of foreign origin made safe for a terminal: no control characters, no direction overrides, at most `longest` characters."""
    kept = "".join(letter for letter in text if letter == " " or not unicodedata.category(letter).startswith(("C", "Z")))
    return kept if len(kept) <= longest else kept[: max(longest - 1, 0)] + "…"
