"""The text panels of the status screen: thin widgets around pure text.

Enters: `Status`. Leaves: what one panel shows. Foreign text was made safe by `status_text`; nothing here is read as markup.
"""

from __future__ import annotations

from itertools import groupby

from rich.text import Text
from textual.widgets import Static

from tscale_fed.status import EventLine, LossPoint, Status
from tscale_fed.status_text import event_time, loss_text, summary
from tscale_fed.tui.drawing import NO_CURVE, SWARM, TRAIN, fit, loss_curve, zoom
from tscale_fed.units import count_text

AXIS_CHARACTERS = 8
_CURVE_STYLES = {NO_CURVE: "", TRAIN: "cyan", SWARM: "bold yellow"}
_PHASE_STYLES = {"training": "bold green", "joining": "bold yellow", "paused": "bold yellow", "leaving": "bold magenta"}
ZOOMS = ((1.0, "whole run"), (0.5, "last half"), (0.1, "last tenth"))


class Summary(Static):
    """Six lines on top: who and what, me, swarm, wire, reach or transfer, refused; a seventh in red when the peer is gone."""

    DEFAULT_CSS = "Summary { height: 6; padding: 0 1; }"

    def __init__(self) -> None:
        super().__init__("connecting ...")
        self._status: Status | None = None
        self._gone: str | None = None

    def show(self, status: Status | None, gone: str | None) -> None:
        """`gone` is the sentence that says why there is no connection; it takes the title's place, the rest is dimmed."""
        self._status, self._gone = status, gone
        self._draw()

    def on_resize(self) -> None:
        self._draw()

    def _draw(self) -> None:
        width = self.content_size.width
        if width == 0:
            return  # not laid out yet; on_resize draws
        lines = summary(self._status) if self._status is not None else []
        text = Text(no_wrap=True)
        for index, parts in enumerate(lines):
            fitted = fit(parts, width)
            if index == 0:
                text.append(fitted, _PHASE_STYLES.get(self._status.phase, "bold") if self._status else "bold")
            else:
                label = min(len(parts[0]), len(fitted))
                text.append(fitted[:label], "bold").append(fitted[label:], "dim" if self._gone else "")
            text.append("\n" if index + 1 < len(lines) else "")
        if self._gone is not None:
            rest = text.split("\n")[1:]
            text = Text("\n", no_wrap=True).join([Text(self._gone[:width], "bold white on red"), *rest])
        self.update(text)


class LossPanel(Static):
    """The loss curve: own training loss and the swarm's held-out loss over own steps."""

    DEFAULT_CSS = "LossPanel { border-top: solid $primary; padding: 0 1; }"

    def __init__(self) -> None:
        super().__init__("")
        self._points: list[LossPoint] = []
        self._zoom = 0

    def show(self, points: list[LossPoint]) -> None:
        if points != self._points:
            self._points = points
            self._draw()

    def next_zoom(self) -> None:
        """Whole run -> last half -> last tenth -> whole run."""
        self._zoom = (self._zoom + 1) % len(ZOOMS)
        self._draw()

    def on_resize(self) -> None:
        self._draw()

    def _draw(self) -> None:
        fraction, words = ZOOMS[self._zoom]
        width, height = self.content_size.width, self.content_size.height
        curve = loss_curve(zoom(self._points, fraction), width - AXIS_CHARACTERS, height - 1)
        if curve is None:
            self.border_title = "loss"
            self.update("no loss yet" if height > 0 else "")
            return
        self.border_title = "loss: train and swarm (held out), nats per token"
        text = Text(no_wrap=True)
        for index, cells in enumerate(curve.cells):
            label = loss_text(curve.high) if index == 0 else loss_text(curve.low) if index == len(curve.cells) - 1 else ""
            text.append(label.rjust(AXIS_CHARACTERS - 1) + "│", "dim")
            for layer, run in groupby(cells, key=lambda cell: cell[1]):
                text.append("".join(character for character, _ in run), _CURVE_STYLES[layer])
            text.append("\n")
        steps = f"{words} (z), step {count_text(curve.first_step)} to {count_text(curve.last_step)}"
        text.append("━ train  ", _CURVE_STYLES[TRAIN]).append("━ swarm  ", _CURVE_STYLES[SWARM]).append(steps, "dim")
        self.update(text)


class EventPanel(Static):
    """The newest events, last one at the bottom."""

    DEFAULT_CSS = "EventPanel { border-top: solid $primary; padding: 0 1; }"

    def __init__(self) -> None:
        super().__init__("")
        self.border_title = "events"
        self._events: list[EventLine] = []

    def show(self, events: list[EventLine]) -> None:
        if events != self._events:
            self._events = events
            self._draw()

    def on_resize(self) -> None:
        self._draw()

    def _draw(self) -> None:
        room, width = self.content_size.height, self.content_size.width
        shown = self._events[-room:] if room > 0 else []
        text = Text(no_wrap=True)
        for index, event in enumerate(shown):
            stamp = event_time(event.unix_s)
            text.append(stamp, "dim").append(f"  {event.text}"[: max(width - len(stamp), 0)])
            text.append("\n" if index + 1 < len(shown) else "")
        self.update(text if shown else Text("nothing yet", "dim"))
