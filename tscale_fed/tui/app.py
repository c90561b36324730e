"""The status screen: subscribes to a running peer and hands each snapshot to the panels. It can only watch and ask.

Enters: a home directory and key strokes. Leaves: the screen, and the commands `pause`, `resume`, `stop`. When the peer goes away the
screen says so, keeps the last figures dimmed and looks for the peer until it is back. Training never waits for a screen.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.widgets import Footer, Input

from tscale_fed.control_client import AsyncControlClient
from tscale_fed.limits import CONFIRM_S, RECONNECT_INTERVAL_S
from tscale_fed.status import Status
from tscale_fed.tui.panels import EventPanel, LossPanel, Summary
from tscale_fed.tui.peer_table import PeerTable
from tscale_fed.units import duration_text, plain
from tscale_net.errors import Refused
from tscale_net.ports import Clock, SystemClock

WIDE_COLUMNS = 110
"""From this width on, curve and events stand beside the table instead of around it."""
_SENTENCE_CHARACTERS = 300


class StatusApp(App[None]):
    """`tscale-status` on a terminal. `first` is shown until the subscription brings the next snapshot."""

    CSS = """
    Screen { layout: vertical; }
    #main { height: 1fr; layout: vertical; }
    #side { height: 10; }
    LossPanel { height: 1fr; }
    EventPanel { height: 4; }
    #filter { display: none; height: 1; border: none; padding: 0 1; }
    #filter.shown { display: block; }
    .-wide #main { layout: horizontal; }
    .-wide PeerTable { width: 80; height: 100%; }
    .-wide #side { width: 1fr; height: 100%; border-left: solid $primary; }
    .-wide EventPanel { height: 1fr; }
    """
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (WIDE_COLUMNS, "-wide")]
    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = "PeerTable"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("s", "sort", "sort"),
        Binding("slash", "filter", "filter", key_display="/"),
        Binding("z", "zoom", "zoom"),
        Binding("p", "pause", "pause/go on"),
        Binding("x", "leave", "leave swarm"),
        Binding("question_mark", "keys", "keys", key_display="?"),
        Binding("y", "confirm_leave", "yes, leave", show=False),
        Binding("escape", "clear_filter", "clear filter", show=False),
    ]

    def __init__(self, home: Path, *, first: Status | None = None, clock: Clock | None = None) -> None:
        super().__init__()
        self._client = AsyncControlClient(home)
        self._clock: Clock = clock or SystemClock()
        self._status = first
        self._gone: str | None = None
        self._lost_s = 0.0
        self._leave_asked_s: float | None = None
        self._summary, self._table, self._curve, self._events = Summary(), PeerTable(), LossPanel(), EventPanel()
        self._filter = Input(placeholder="part of a name, id, state or path; Enter keeps it, Esc clears it", id="filter")

    def compose(self) -> ComposeResult:
        yield self._summary
        with Container(id="main"):
            yield self._table
            with Vertical(id="side"):
                yield self._curve
                yield self._events
        yield self._filter
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.title = "tscale-status"
        self._draw()
        self.run_worker(self._follow(), name="follow")

    async def _follow(self) -> None:
        """Show snapshots for as long as the screen is open; after a loss, try again every second. Ends with the app."""
        while True:
            try:
                async for snapshot in self._client.subscribe():
                    self._status, self._gone = snapshot, None
                    self._draw()
            except Refused as refusal:
                if self._gone is None:
                    self._lost_s = self._clock.now()
                gone_for = duration_text(self._clock.now() - self._lost_s)
                self._gone = f"the peer is gone ({gone_for}): {plain(refusal.detail, _SENTENCE_CHARACTERS)}"
                self._draw()
            await self._clock.sleep(RECONNECT_INTERVAL_S)

    def _draw(self) -> None:
        if not self._summary.is_attached:
            return  # the screen is being taken down while a last snapshot arrives
        self._summary.show(self._status, self._gone)
        if self._status is not None:
            self._table.show(self._status.peers)
            self._curve.show(self._status.losses)
            self._events.show(self._status.events)

    def action_sort(self) -> None:
        self._table.sort_by_next()

    def action_zoom(self) -> None:
        self._curve.next_zoom()

    def action_filter(self) -> None:
        self._filter.add_class("shown")
        self._filter.focus()

    def action_clear_filter(self) -> None:
        self._filter.value = ""
        self._close_filter()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._table.filter_by(event.value)

    def on_input_submitted(self) -> None:
        self._close_filter()

    def _close_filter(self) -> None:
        self._filter.remove_class("shown")
        self._table.focus()

    def action_pause(self) -> None:
        paused = self._status is not None and self._status.phase == "paused"
        self.run_worker(self._command("resume" if paused else "pause"), name="command")

    def action_leave(self) -> None:
        """`x` asks, `y` within a few seconds does it: a slip of the finger must not end a run."""
        self._leave_asked_s = self._clock.now()
        self._tell("press y to make the peer publish its last work and leave the swarm", severity="warning")

    def action_confirm_leave(self) -> None:
        if self._leave_asked_s is not None and self._clock.now() - self._leave_asked_s <= CONFIRM_S:
            self._leave_asked_s = None
            self.run_worker(self._command("stop"), name="command")

    def action_keys(self) -> None:
        self._tell("q quit   s sort   / filter   Esc clear   z zoom   p pause or go on   x, y leave the swarm   arrows, PgUp, PgDn scroll")

    async def _command(self, name: str) -> None:
        try:
            self._tell(await self._client.command(name))
        except Refused as refusal:
            self._tell(refusal.detail, severity="error")

    def _tell(self, sentence: str, severity: str = "information") -> None:
        self.notify(plain(sentence, _SENTENCE_CHARACTERS), severity=severity, markup=False)  # type: ignore[arg-type]
