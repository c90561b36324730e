"""The table of peers: sorted and filtered rows in, changed cells out.

`arrange` is pure. The widget keeps one slot per row position and writes only the cells of visible slots whose text changed: clearing and
refilling a table of 200 peers would cost a third of a core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.text import Text
from textual.widgets import DataTable

from tscale_fed.status import PeerRow
from tscale_fed.status_text import PEER_COLUMNS, peer_cells, peers_text
from tscale_fed.units import plain

_WIDTHS = (18, 7, 6, 7, 6, 4, 9, 6)
"""Column widths; with one blank on both sides of each and the scroll bar they fill exactly 80 columns."""
_STATE_STYLES = {"live": "green", "suspect": "yellow", "dead": "red", "banned": "red"}
_STATE_COLUMN = PEER_COLUMNS.index("state")
_FILTER_CHARACTERS = 30

_UNKNOWN = float("inf")
SORTS: dict[str, Callable[[PeerRow], tuple[object, ...]]] = {
    "name": lambda peer: (peer.name.casefold(), peer.id),
    "state": lambda peer: (("live", "suspect", "dead", "banned").index(peer.state), peer.name.casefold(), peer.id),
    "rtt": lambda peer: (_UNKNOWN if peer.rtt_ms is None else peer.rtt_ms, peer.id),
    "share": lambda peer: (-(peer.share or 0.0), peer.id),
    "lag": lambda peer: (-(peer.lag or 0), peer.id),
    "last delta": lambda peer: (_UNKNOWN if peer.last_delta_s is None else peer.last_delta_s, peer.id),
}
"""Ways to sort, in the order in which `s` walks through them; the most telling row comes first, ties by peer id."""


def arrange(peers: Sequence[PeerRow], sort: str, wanted: str) -> list[PeerRow]:
    """The peers whose name, id, state, path or address contains `wanted` (any case), sorted by one of `SORTS`."""
    wanted = wanted.casefold()
    kept = [
        peer
        for peer in peers
        if not wanted or any(wanted in text.casefold() for text in (peer.name, peer.id, peer.state, peer.path, peer.address))
    ]
    return sorted(kept, key=SORTS[sort])


class PeerTable(DataTable[Text]):
    """Shows `arrange(peers)`; `sort_by_next`, `filter_by` change the order and choice."""

    DEFAULT_CSS = "PeerTable { border-top: solid $primary; height: 1fr; scrollbar-size-vertical: 1; min-height: 4; }"

    def __init__(self) -> None:
        super().__init__(cursor_type="none", zebra_stripes=True, show_row_labels=False)
        self._peers: list[PeerRow] = []
        self._rows: list[tuple[str, ...]] = []
        self._written: list[tuple[str, ...] | None] = []
        self.sort_name = "share"
        self.wanted = ""

    def on_mount(self) -> None:
        for title, width in zip(PEER_COLUMNS, _WIDTHS, strict=True):
            self.add_column(title, width=width, key=title)
        self.border_title = "peers"

    def show(self, peers: list[PeerRow]) -> None:
        """A new snapshot's peers."""
        self._peers = peers
        self._arrange()

    def sort_by_next(self) -> None:
        names = list(SORTS)
        self.sort_name = names[(names.index(self.sort_name) + 1) % len(names)]
        self._arrange()

    def filter_by(self, wanted: str) -> None:
        self.wanted = wanted.strip()
        self._arrange()

    def on_resize(self) -> None:
        self._write_visible()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        self._write_visible()

    def _arrange(self) -> None:
        self._rows = [peer_cells(peer) for peer in arrange(self._peers, self.sort_name, self.wanted)]
        title = f"peers: {peers_text(self._peers)}; by {self.sort_name} (s)"
        self.border_title = title + (f"; only '{plain(self.wanted, _FILTER_CHARACTERS)}' (/)" if self.wanted else "")
        while self.row_count < len(self._rows):
            self.add_row(*(Text("") for _ in PEER_COLUMNS), key=str(self.row_count))
            self._written.append(None)
        while self.row_count > len(self._rows):
            self._written.pop()
            self.remove_row(str(self.row_count - 1))
        self._write_visible()

    def _write_visible(self) -> None:
        first = max(int(self.scroll_y) - 1, 0)
        for slot in range(first, min(first + self.size.height + 2, len(self._rows))):
            row, written = self._rows[slot], self._written[slot]
            if row == written:
                continue
            for column, (title, cell) in enumerate(zip(PEER_COLUMNS, row, strict=True)):
                if written is None or written[column] != cell:
                    style = _STATE_STYLES.get(cell, "") if column == _STATE_COLUMN else ""
                    self.update_cell(str(slot), title, Text(cell, style, no_wrap=True))
            self._written[slot] = row
