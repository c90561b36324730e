"""What people should see: one sentence per happening, and a count of everything that was refused, by reason.

Enters: sentences and refusals from all parts of a peer. Leaves: a bounded list, counters, and a call per notice for the console.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from tscale_net.errors import Refused
from tscale_net.ports import Clock
from tscale_peers import limits


@dataclass(frozen=True, slots=True)
class Notice:
    """One happening. `at` is Unix time, `kind` is stable for programs, `text` is one sentence for people."""

    at: float
    kind: str
    text: str


class NoticeBoard:
    """Bounded memory of notices, and the counters of refusals."""

    def __init__(self, clock: Clock, show: Callable[[Notice], None] = lambda notice: None) -> None:
        self.notices: deque[Notice] = deque(maxlen=limits.notices_kept)
        self.refused: Counter[str] = Counter()
        self._clock = clock
        self._show = show
        self._shown: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        """(code, who) -> when it was shown last, how often it was refused unseen since."""

    def tell(self, kind: str, text: str, keep: bool = True) -> None:
        """Show a notice; `keep` it unless it comes so often that it would push the others out."""
        notice = Notice(self._clock.wall(), kind, text)
        if keep:
            self.notices.append(notice)
        self._show(notice)

    def refuse(self, refusal: Refused, who: str) -> None:
        """Count it and show it: nothing is turned away silently. The same from the same peer is shown once per `refusal_notice_s`, with how
        often it came, so that a flood of nonsense does not push everything else out of sight."""
        self.refused[refusal.code] += 1
        now = self._clock.now()
        shown_at, unseen = self._shown.pop((refusal.code, who), (now - limits.refusal_notice_s, 0))
        if now - shown_at < limits.refusal_notice_s:
            self._shown[refusal.code, who] = (shown_at, unseen + 1)
            return
        self._shown[refusal.code, who] = (now, 0)
        if len(self._shown) > limits.refusals_remembered:
            self._shown.popitem(last=False)
        more = f" ({unseen} more of this kind)" if unseen else ""
        self.tell("refused", f"refused from {who}: {refusal.detail}{more}")
