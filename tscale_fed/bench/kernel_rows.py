"""One row of the kernel bench, and the printed table.

Enters: timings. Leaves: rows as JSON values, lines for people: ms, TOPS and GB/s of each op beside the same run's baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

HEADER = f"{'':34} {'ms':>8} {'TOPS':>6} {'GB/s':>6} {'of copy':>7} {'launch':>7}  beside"


@dataclass(frozen=True)
class Row:
    """Figures of one op at one size. `beside`: name of a baseline -> its ms in the same run. `error`: why there are none."""

    size: str
    case: str
    ms: float = 0.0
    launch_us: float = 0.0
    spread: float = 0.0
    graph: bool = True
    operations: int = 0
    bytes_moved: int = 0
    beside: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def tops(self) -> float:
        return self.operations / self.ms / 1e9 if self.ms else 0.0

    @property
    def gb_s(self) -> float:
        return self.bytes_moved / self.ms / 1e6 if self.ms else 0.0

    def values(self) -> dict[str, Any]:
        """JSON values, figures derived included, rounded to what the measurement can tell."""
        rounded = {"ms": round(self.ms, 5), "launch_us": round(self.launch_us, 1), "spread": round(self.spread, 3)}
        beside = {name: round(ms, 5) for name, ms in self.beside.items()}
        return {**asdict(self), **rounded, "beside": beside, "tops": round(self.tops, 1), "gb_s": round(self.gb_s, 1)}

    def line(self, copy_gb_s: float) -> str:
        """One line of the table."""
        if self.error:
            return f"{self.case:34} FAILED: {self.error}"
        tops = f"{self.tops:6.0f}" if self.operations else f"{'':6}"
        bandwidth = f"{self.gb_s:6.0f} {self.gb_s / copy_gb_s:7.0%}" if self.bytes_moved else f"{'':14}"
        beside = ", ".join(f"{name} {ms:.3f} ({ms / self.ms:.2f}x)" for name, ms in self.beside.items())
        return f"{self.case:34} {self.ms:8.4f} {tops} {bandwidth} {self.launch_us:4.0f} us  {beside}{'' if self.graph else ' [no graph]'}"


def table_lines(rows: Sequence[Row], copy_gb_s: float) -> list[str]:
    """All rows, a heading for each size."""
    lines: list[str] = []
    for size in dict.fromkeys(row.size for row in rows):
        lines += ["", f"{size}", HEADER, *(row.line(copy_gb_s) for row in rows if row.size == size)]
    return lines
