"""What `tscale-peer` prints: the join transcript, progress of transfers, a status line.

Enters: sentences, transfer progress, `Status` snapshots. Leaves: text on one stream. On a terminal the last line is live (a progress
bar or the status) and redrawn in place; elsewhere (a log file, a pipe) every line is final, and status and progress appear once per 10 s.
Each line begins with the time since the start, so that a transcript tells what took how long:

     0.2s  you are brave-otter (12D3…c1), key in ~/.local/share/tscale-fed/identity
     9.0s  snapshot ████████░░ 78 %  1.2 GB of 1.5 GB from 6 peers  94 Mbit/s  23s left
     2:04  training

A reader that goes away (`tscale-peer | head`) ends the output, never the training. Safe to call from several threads.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import deque
from typing import Protocol, TextIO

from tscale_fed.limits import LIVE_INTERVAL_S, PLAIN_STATUS_INTERVAL_S, PROGRESS_RATE_WINDOW_S
from tscale_fed.status import Status
from tscale_fed.status_text import line as status_line
from tscale_fed.units import bytes_text, duration_text, plain, rate_text

ELAPSED_CHARACTERS = 6
BAR_CHARACTERS = 10
_CLEAR_LINE = "\r\x1b[K"
_LONGEST_LINE_CHARACTERS = 1000
"""A sentence may name paths and several addresses; longer than this is an accident."""


class Monotonic(Protocol):
    """The part of `tscale_net.ports.Clock` that the console needs."""

    def now(self) -> float: ...


class RateMeter:
    """Mean rate over the last few seconds of a growing counter."""

    def __init__(self, window_s: float = PROGRESS_RATE_WINDOW_S) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, float]] = deque()

    def add(self, now_s: float, total: float) -> None:
        """Record the counter; a counter that fell starts afresh."""
        if self._samples and total < self._samples[-1][1]:
            self._samples.clear()
        self._samples.append((now_s, total))
        while len(self._samples) > 2 and now_s - self._samples[1][0] >= self._window_s:
            self._samples.popleft()

    def per_s(self) -> float | None:
        """None until two samples lie apart in time."""
        if len(self._samples) < 2 or self._samples[-1][0] <= self._samples[0][0]:
            return None
        (first_s, first), (last_s, last) = self._samples[0], self._samples[-1]
        return (last - first) / (last_s - first_s)


def bar_text(fraction: float, characters: int = BAR_CHARACTERS, *, full: str = "█", empty: str = "░") -> str:
    """0.78 -> `████████░░`; fractions outside 0..1 are clamped."""
    filled = round(min(max(fraction, 0.0), 1.0) * characters)
    return full * filled + empty * (characters - filled)


def progress_text(what: str, done_bytes: int, total_bytes: int, sources: int | None, rate_bytes_s: float | None, bar: str) -> str:
    """One transfer as a line, without the time in front."""
    fraction = done_bytes / total_bytes if total_bytes else 1.0
    parts = [f"{what} {bar} {fraction * 100:.0f} %".replace("  ", " "), f"{bytes_text(done_bytes)} of {bytes_text(total_bytes)}"]
    if sources:
        parts[-1] += f" from {sources} peer{'s' if sources > 1 else ''}"
    if rate_bytes_s is not None:
        parts.append(rate_text(rate_bytes_s))
        if rate_bytes_s > 0 and done_bytes < total_bytes:
            parts.append(f"{duration_text((total_bytes - done_bytes) / rate_bytes_s)} left")
    return "  ".join(parts)


class Console:
    """Prints for people; with `json_log`, one JSON object per line for programs.

    `terminal` and `width` default to what the stream is; tests pass them.
    """

    def __init__(
        self,
        stream: TextIO,
        clock: Monotonic,
        *,
        json_log: bool = False,
        terminal: bool | None = None,
        width: int | None = None,
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._start_s = clock.now()
        self._json_log = json_log
        self._terminal = not json_log and (_is_terminal(stream) if terminal is None else terminal)
        self._width = width
        self._unicode = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")
        self._lock = threading.Lock()
        self._live = ""
        self._next_live_s = self._next_plain_s = self._start_s
        self._meter: tuple[str, RateMeter] | None = None
        self._closed = False

    @property
    def elapsed_s(self) -> float:
        return self._clock.now() - self._start_s

    def say(self, text: str) -> None:
        """One line of the transcript, with the elapsed time in front."""
        self._final("say", text)

    def warn(self, text: str) -> None:
        """A line that the reader should act on; marked with `!`."""
        self._final("warn", text, mark="! ")

    def detail(self, text: str) -> None:
        """A line that belongs to the one above: no time in front."""
        self._final("detail", text, timed=False)

    def progress(self, what: str, done_bytes: int, total_bytes: int, *, sources: int | None = None) -> None:
        """A transfer's progress: a live line with a bar on a terminal, one line per 10 s elsewhere. Call it as often as you like."""
        with self._lock:
            now = self._clock.now()
            if self._meter is None or self._meter[0] != what:
                self._meter = (what, RateMeter())
                self._next_live_s = now
                self._next_plain_s = now + PLAIN_STATUS_INTERVAL_S
            self._meter[1].add(now, done_bytes)
            rate = self._meter[1].per_s()
            finished = done_bytes >= total_bytes
            bar = bar_text(done_bytes / total_bytes if total_bytes else 1.0, full=self._glyph("█", "#"), empty=self._glyph("░", "."))
            text = progress_text(what, done_bytes, total_bytes, sources, rate, bar if self._terminal else "")
            if finished:
                self._meter = None
                self._write_final("progress", text)
            elif self._terminal:
                self._redraw(text, now)
            elif now >= self._next_plain_s:
                self._next_plain_s = now + PLAIN_STATUS_INTERVAL_S
                self._write_final("progress", text)

    def status(self, status: Status) -> None:
        """The state now: the live line on a terminal, one line per 10 s elsewhere. Call it as often as you like."""
        with self._lock:
            now = self._clock.now()
            if self._terminal:
                self._redraw(status_line(status), now)
            elif now >= self._next_plain_s:
                self._next_plain_s = now + PLAIN_STATUS_INTERVAL_S
                self._write_final("status", status_line(status))

    def close(self) -> None:
        """Leave the cursor on a clean line."""
        with self._lock:
            if self._live:
                self._live = ""
                self._write(_CLEAR_LINE)

    def _final(self, kind: str, text: str, *, mark: str = "", timed: bool = True) -> None:
        with self._lock:
            self._write_final(kind, text, mark=mark, timed=timed)

    def _write_final(self, kind: str, text: str, *, mark: str = "", timed: bool = True) -> None:
        text = plain(text, _LONGEST_LINE_CHARACTERS)
        if self._json_log:
            self._write(json.dumps({"t_s": round(self.elapsed_s, 3), "kind": kind, "text": text}, ensure_ascii=False) + "\n")
            return
        clear, self._live = (_CLEAR_LINE if self._live else ""), ""
        self._write(f"{clear}{self._stamp() if timed else ' ' * ELAPSED_CHARACTERS}  {mark}{text}\n")

    def _redraw(self, text: str, now: float) -> None:
        if now < self._next_live_s:
            return
        self._next_live_s = now + LIVE_INTERVAL_S
        # One column stays free: a line that fills the last one wraps on many terminals and could not be redrawn.
        room = (self._width or _columns(self._stream)) - 1
        live = plain(f"{self._stamp()}  {text}", room)
        if live != self._live:
            self._live = live
            self._write(_CLEAR_LINE + live)

    def _stamp(self) -> str:
        return duration_text(self.elapsed_s).rjust(ELAPSED_CHARACTERS)

    def _glyph(self, unicode_form: str, ascii_form: str) -> str:
        return unicode_form if self._unicode else ascii_form

    def _write(self, text: str) -> None:
        if self._closed:
            return
        if not self._unicode:
            text = text.replace("…", "...").replace("✓", "ok").encode("ascii", "replace").decode("ascii")
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # The reader is gone (closed pipe or terminal, full disk under a log file). Training goes on; tscale-status still shows all.
            self._closed = True


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 80


def standard_console(clock: Monotonic, *, json_log: bool = False) -> Console:
    """The console on standard output."""
    return Console(sys.stdout, clock, json_log=json_log)
