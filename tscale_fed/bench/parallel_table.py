"""The printed table of `bench parallel`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tscale_fed.units import bytes_text

HEAD = (
    "row", "ranks", "ms per step", "tokens/s", "times one", "of ideal", "bytes/step", "bytes/weight", "exchange ms", "tokens", "held-out"
)  # fmt: skip


def table_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line per row under a header, columns aligned; a row that failed says why."""
    one = next((row.get("tokens_per_s") for row in rows if row["row"] == "one"), None)
    cells = [HEAD] + [_cells(row, one) for row in rows if "failure" not in row]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEAD))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return lines + [f"{row['row']}: {row['failure']}" for row in rows if "failure" in row]


def _cells(row: dict[str, Any], one: float | None) -> tuple[str, ...]:
    speed = row.get("tokens_per_s")
    times = speed / one if speed and one else None
    tokens, loss = row["held_out_loss"][-1] if row.get("held_out_loss") else (None, None)
    moved = row.get("bytes_per_step_and_rank")
    return (
        row["row"],
        str(row["ranks"]),
        _number(row.get("ms_per_step"), "{:.1f}"),
        _number(speed, "{:,.0f}"),
        _number(times, "{:.2f}"),
        _number(times / row["ranks"] if times else None, "{:.1%}"),
        "-" if moved is None else bytes_text(moved),
        _number(row.get("bytes_per_weight"), "{:.4f}"),
        _number(row.get("exchange_alone_ms"), "{:.1f}"),
        _number(tokens, "{:,.0f}"),
        _number(loss, "{:.4f}"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
