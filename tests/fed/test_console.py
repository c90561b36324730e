"""The console: transcript, progress and status, on a terminal and in a log file."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass

import pytest

from tscale_fed.console import Console, RateMeter, bar_text
from tscale_fed.tui.testing import FakePeer


@dataclass
class HandClock:
    """Time moves only when the test says so."""

    seconds: float = 100.0

    def now(self) -> float:
        return self.seconds


class Screen:
    """What a terminal of one line height would show: applies carriage return and clear-line, collects finished lines."""

    def __init__(self, written: str) -> None:
        *finished, self.live = (self._visible(line) for line in written.split("\n"))
        self.lines = finished

    @staticmethod
    def _visible(line: str) -> str:
        return line.rsplit("\r\x1b[K", 1)[-1]


def test_transcript_has_times_marks_and_details() -> None:
    out, clock = io.StringIO(), HandClock()
    console = Console(out, clock)
    clock.seconds += 0.24
    console.say("you are brave-otter")
    console.detail("new identity, keep this file")
    clock.seconds += 130
    console.warn("first contact: pinned its id")
    assert out.getvalue().splitlines() == [
        "  0.2s  you are brave-otter",
        "        new identity, keep this file",
        "  2:10  ! first contact: pinned its id",
    ]


def test_log_file_gets_one_status_line_per_ten_seconds() -> None:
    out, clock, fake = io.StringIO(), HandClock(), FakePeer(2)
    console = Console(out, clock)
    for _ in range(300):
        console.status(fake.snapshot())
        clock.seconds += 0.1
    lines = out.getvalue().splitlines()
    assert len(lines) == 3 and all("loss" in line for line in lines)
    assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()


def test_log_file_progress_is_rare_and_ends_with_the_whole() -> None:
    out, clock = io.StringIO(), HandClock()
    console = Console(out, clock)
    for second in range(26):
        console.progress("snapshot", second * 1_000_000, 25_000_000, sources=6)
        clock.seconds += 1.0
    lines = out.getvalue().splitlines()
    assert [re.search(r"\d+ %", line).group() for line in lines] == ["40 %", "80 %", "100 %"]  # type: ignore[union-attr]
    assert "from 6 peers" in lines[0] and "8.0 Mbit/s" in lines[0] and "15.0s left" in lines[0]


def test_terminal_progress_is_one_live_line() -> None:
    out, clock = io.StringIO(), HandClock()
    console = Console(out, clock, terminal=True, width=100)
    for second in range(1, 8):
        console.progress("snapshot", second * 100_000_000, 1_000_000_000, sources=1)
        clock.seconds += 1.0
    shown = Screen(out.getvalue())
    assert shown.lines == [] and "snapshot ███████░░░ 70 %  700 MB of 1.0 GB from 1 peer  800 Mbit/s  3.0s left" in shown.live
    console.say("a line in between")
    assert Screen(out.getvalue()).lines == ["  7.0s  a line in between"]
    console.progress("snapshot", 1_000_000_000, 1_000_000_000)
    assert "██████████ 100 %" in Screen(out.getvalue()).lines[-1]


def test_terminal_status_is_redrawn_and_fits() -> None:
    out, clock, fake = io.StringIO(), HandClock(), FakePeer(2)
    console = Console(out, clock, terminal=True, width=60)
    for _ in range(50):
        console.status(fake.snapshot())
        clock.seconds += 0.05
    redraws = out.getvalue().count("\r")
    assert redraws <= 14 and len(Screen(out.getvalue()).live) <= 59
    console.close()
    assert Screen(out.getvalue()).live == ""


def test_json_log() -> None:
    out, clock = io.StringIO(), HandClock()
    console = Console(out, clock, json_log=True)
    clock.seconds += 1.5
    console.say('a "quoted" line\x1b[2J')
    console.status(FakePeer(1).snapshot())
    first, second = map(json.loads, out.getvalue().splitlines())
    assert first == {"t_s": 1.5, "kind": "say", "text": 'a "quoted" line[2J'} and second["kind"] == "status"


def test_foreign_text_cannot_steer_the_terminal() -> None:
    out = io.StringIO()
    Console(out, HandClock()).say("peer \x1b]0;evil\x07 says\r\nhi")
    assert out.getvalue() == "  0.0s  peer ]0;evil sayshi\n"


def test_a_stream_without_unicode_gets_ascii() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(out, HandClock(), terminal=True, width=80)
    console.progress("snapshot", 5, 10)
    console.say("done ✓ 9c1e…44 ü")
    assert b"#####....." in raw.getvalue() and b"done ok 9c1e...44 ?" in raw.getvalue()


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("I/O operation on closed file")])
def test_a_reader_that_goes_away_ends_the_output_only(error: Exception) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    console = Console(Gone(), HandClock())
    console.say("nobody hears this")
    console.status(FakePeer(0).snapshot())
    console.close()


def test_rate_meter_forgets_the_past_and_restarts() -> None:
    meter = RateMeter(window_s=5.0)
    assert meter.per_s() is None
    for second in range(20):
        meter.add(float(second), 1000.0 if second < 10 else 1000.0 + (second - 9) * 50)
    assert meter.per_s() == pytest.approx(50.0)
    meter.add(21.0, 0.0)
    assert meter.per_s() is None


def test_bar_is_clamped() -> None:
    assert bar_text(-1) == "░" * 10 and bar_text(0.78) == "████████░░" and bar_text(7.0) == "█" * 10
