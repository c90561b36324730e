"""Numbers as people write and read them."""

from __future__ import annotations

import math

import pytest

from tscale_fed import units


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("8", 1.0),
        ("20M", 2.5e6),
        ("500k", 62_500.0),
        ("500K", 62_500.0),
        ("20Mbit/s", 2.5e6),
        ("20 Mbps", 2.5e6),
        ("2.5MB/s", 2.5e6),
        ("1GB", 1e9),
        (".5M", 62_500.0),
    ],
)
def test_parse_rate(text: str, bytes_per_s: float) -> None:
    assert units.parse_rate(text) == pytest.approx(bytes_per_s)


@pytest.mark.parametrize("text", ["", "0", "-1", "fast", "20X", "1e9", "nan", "inf", "20Mm", "0.0M", "٣M"])
def test_parse_rate_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="write for example 20M"):
        units.parse_rate(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0s"),
        (0.24, "0.2s"),
        (59.94, "59.9s"),
        (59.96, "1:00"),
        (124, "2:04"),
        (3599.4, "59:59"),
        (3599.6, "1h00"),
        (8040, "2h14"),
        (180_000, "2d02h"),
        (-1, "?"),
        (math.nan, "?"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert units.duration_text(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1000, "1.0k"), (41_234, "41.2k"), (999_999, "1.0M"), (241_000, "241k"), (math.nan, "?")]
)
def test_count(number: float, text: str) -> None:
    assert units.count_text(number) == text


def test_bytes_and_rates() -> None:
    assert units.bytes_text(1_234_567) == "1.2 MB" and units.bytes_text(12) == "12 B"
    assert units.rate_text(11_750_000) == "94.0 Mbit/s" and units.rate_text(0) == "0 bit/s"


def test_plain_text_is_safe_and_short() -> None:
    assert units.plain("a\x1b[31mb\tc\u2028d\u202ee é ✓", 80) == "a[31mbcde é ✓"
    assert units.plain("abcdef", 4) == "abc…"
    assert units.short_hex("9c1e" + "0" * 58 + "44") == "9c1e…44" and units.short_hex("") == "-"
