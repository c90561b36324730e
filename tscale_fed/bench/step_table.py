"""From times to figures: tokens per second, TParams/s, the share of the card's limit, against the baseline; the printed table; the goal.

Enters: `Timed` rows. Leaves: JSON values, lines of text, met or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tscale_fed.bench.step_measure import Timed
from tscale_fed.bench.step_rows import BASELINE, Sizes

H100_LIMIT_TPARAMS = 182.0
"""int8 matrix products at their measured best on an H100, the 1.5 B model, embedding not counted (spec/kernels.md 4)."""
BIG_GOAL = (100.0, 1.5)
"""TParams/s with the embedding, as the original counts its 37.2, and times the baseline."""
BIG_HOST_GOAL = (45.0, 12.8e9, 12.0)
"""TParams/s, bytes of GPU memory, bytes of host memory per weight, with the optimizer in host memory."""
SMALL_GOAL_TOKENS_PER_S = 700_000.0
ORIGINAL = {"big": "the original TScale on an H100: 24,680 tokens/s, 37.2 TParams/s, 12.8 GB, 32.6 GB of host memory",
            "small": "the original TScale on an H100: 349,000 tokens/s, 8.3 TParams/s"}  # fmt: skip


def figures(sizes: Sizes, row: Timed, rows: Sequence[Timed]) -> dict[str, Any]:
    """JSON values of a row; empty for a row that failed."""
    if not row.milliseconds:
        return {}
    per_s = sizes.step_tokens / row.median_ms * 1e3
    shape = sizes.shape
    without = shape.trained_parameters - shape.embedding_rows * shape.width
    baseline = next((other for other in rows if other.name == BASELINE and other.milliseconds), None)
    ordered = sorted(row.milliseconds)
    return {
        "median_ms": row.median_ms,
        "p10_ms": ordered[len(ordered) // 10],
        "p90_ms": ordered[len(ordered) * 9 // 10],
        "tokens_per_s": per_s,
        "tparams_per_s": without * per_s / 1e12,
        "tparams_per_s_with_embedding": shape.parameters * per_s / 1e12,
        "of_limit": without * per_s / 1e12 / H100_LIMIT_TPARAMS,
        "times_baseline": baseline.median_ms / row.median_ms if baseline else None,
        "host_bytes_per_parameter": row.host_bytes / shape.parameters,
    }


def table_lines(sizes: Sizes, rows: Sequence[Timed]) -> list[str]:
    """What the bench prints at the end."""
    shape = sizes.shape
    without = shape.trained_parameters - shape.embedding_rows * shape.width
    lines = [
        f"{shape.dims}, {shape.parameters / 1e6:.2f} M weights ({without / 1e6:.2f} M without the embedding), vocabulary {shape.vocab}, "
        f"{sizes.fragments} x {sizes.tokens} tokens, optimizer included",
        f"{'row':<16}{'ms/step':>9}{'p10..p90':>17}{'tokens/s':>11}{'TParams/s':>10}{'with emb.':>10}{'of 182':>8}{'x base':>8}"
        f"{'peak GB':>9}{'held GB':>9}{'host B/w':>9}{'grown GB':>9}  loss",
    ]
    for row in rows:
        lines.append(f"{row.name:<16}{_cells(sizes, row, rows)}")
    return lines


def _cells(sizes: Sizes, row: Timed, rows: Sequence[Timed]) -> str:
    found = figures(sizes, row, rows)
    if not found:
        return f" {row.failure}"
    spread = f"{found['p10_ms']:.1f}..{found['p90_ms']:.1f}"
    times = f"{found['times_baseline']:.2f}" if found["times_baseline"] else "-"
    return (
        f"{found['median_ms']:>9.2f}{spread:>17}{found['tokens_per_s']:>11,.0f}{found['tparams_per_s']:>10.1f}"
        f"{found['tparams_per_s_with_embedding']:>10.1f}{found['of_limit']:>8.0%}{times:>8}{row.peak_bytes / 1e9:>9.2f}"
        f"{row.reserved_bytes / 1e9:>9.2f}{found['host_bytes_per_parameter']:>9.1f}"
        f"{row.grown_bytes / 1e9:>9.1f}  {row.losses[0]:.3f} -> {row.losses[1]:.3f}"
    )


def goal_met(preset: str, sizes: Sizes, rows: Sequence[Timed]) -> bool:
    """Does the best engine row reach what the project asks of it? Rows with the optimizer in host memory have a goal of their own."""
    engines = [(row, figures(sizes, row, rows)) for row in rows if row.name != BASELINE and row.milliseconds]
    on_device = [found for row, found in engines if not row.name.endswith("@host")]
    if preset == "small":
        return any(found["tokens_per_s"] >= SMALL_GOAL_TOKENS_PER_S for found in on_device)
    least_tparams, least_times = BIG_GOAL
    fast = any(
        found["tparams_per_s_with_embedding"] >= least_tparams and (found["times_baseline"] or 0.0) >= least_times for found in on_device
    )
    hosts = [(row, found) for row, found in engines if row.name.endswith("@host")]
    return fast and all(
        found["tparams_per_s_with_embedding"] >= BIG_HOST_GOAL[0] and max(row.peak_bytes, row.reserved_bytes) <= BIG_HOST_GOAL[1]
        and found["host_bytes_per_parameter"] <= BIG_HOST_GOAL[2]
        for row, found in hosts
    )  # fmt: skip
