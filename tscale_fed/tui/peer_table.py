"""The table of peers: sorted and filtered rows in, lines of text out.

`arrange` is pure. The widget draws only the lines that are visible, each as a few segments: a general table widget spends a third of a
core on 200 peers when refilled once a second, and 5 % when only changed cells are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from tscale_fed.status import PeerRow, PeerState
from tscale_fed.status_text import PEER_COLUMNS, peer_cells, peers_text
from tscale_fed.units import plain

_WIDTHS = (18, 7, 6, 7, 6, 5, 9, 6)
"""Column widths; with the margin and the gaps they fill 80 columns less the scroll bar."""
_MARGIN = " "
_GAP = "  "
_HEADER_STYLE = Style(bold=True)
_STATE_STYLES = {
    "live": Style(color="green"),
    "suspect": Style(color="yellow"),
    "dead": Style(color="red"),
    "left": Style(dim=True),
    "banned": Style(color="red", bold=True),
}
_STATE_COLUMN = PEER_COLUMNS.index("state")
_STATE_ORDER = get_args(PeerState)
_FILTER_CHARACTERS = 30
_HEADER_LINES = 1

_UNKNOWN = float("inf")
SORTS: dict[str, Callable[[PeerRow], tuple[object, ...]]] = {
    "name": lambda peer: (peer.name.casefold(), peer.id),
    "state": lambda peer: (_STATE_ORDER.index(peer.state), peer.name.casefold(), peer.id),
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


def padded(cells: Sequence[str]) -> list[str]:
    """The cells of one line, each padded or cut to its column's width, with what separates it from the one before."""
    return [
        f"{_GAP if column else _MARGIN}{cell[:width]:<{width}}" for column, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True))
    ]


class PeerTable(ScrollView, can_focus=True):
    """Shows `arrange(peers)` under a fixed header; `sort_by_next` and `filter_by` change order and choice, arrows and page keys scroll."""

    DEFAULT_CSS = """
    PeerTable { border-top: solid $primary; height: 1fr; min-height: 4; overflow: hidden scroll; scrollbar-size-vertical: 1; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._peers: list[PeerRow] = []
        self._shown: list[PeerRow] = []
        self.sort_name = "share"
        self.wanted = ""

    @property
    def row_count(self) -> int:
        """Peers that pass the filter."""
        return len(self._shown)

    def on_mount(self) -> None:
        self._arrange()

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

    def _arrange(self) -> None:
        self._shown = arrange(self._peers, self.sort_name, self.wanted)
        title = f"peers: {peers_text(self._peers)}; by {self.sort_name} (s)"
        self.border_title = title + (f"; only '{plain(self.wanted, _FILTER_CHARACTERS)}' (/)" if self.wanted else "")
        self.virtual_size = Size(sum(_WIDTHS), len(self._shown) + _HEADER_LINES)
        self.vertical_scrollbar.window_virtual_size = self.virtual_size.height
        if self.scroll_y > self.max_scroll_y:
            self.scroll_to(y=self.max_scroll_y, animate=False)
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """One visible line, `y` from the top of the widget."""
        if y < _HEADER_LINES:
            return self._strip([Segment("".join(padded(PEER_COLUMNS)), _HEADER_STYLE)])
        row = y - _HEADER_LINES + self.scroll_offset.y
        if row >= len(self._shown):
            return self._strip([])
        cells = padded(peer_cells(self._shown[row]))
        before, after = "".join(cells[:_STATE_COLUMN]), "".join(cells[_STATE_COLUMN + 1 :])
        return self._strip([Segment(before), Segment(cells[_STATE_COLUMN], _STATE_STYLES[self._shown[row].state]), Segment(after)])

    def _strip(self, segments: list[Segment]) -> Strip:
        return Strip(segments).adjust_cell_length(self.scrollable_content_region.width).apply_style(self.rich_style)
