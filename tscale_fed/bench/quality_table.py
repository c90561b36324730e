"""The printed tables of the quality bench, beside the original's figures, and its goal.

Enters: `Trained` runs. Leaves: lines of text, met or not. The original: one H100, int8 with fp8 attention, same text, split, batch and
schedules, one run each; it evaluates ten other fixed random batches, so differences below the printed standard error mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tscale_fed.bench.quality_run import Trained
from tscale_fed.bench.quality_settings import COMPILED, SCHEDULES

ORIGINAL: dict[str, dict[int, tuple[float, float]]] = {
    "qconst": {100: (2.3535, 2.3400), 200: (1.9847, 1.9608), 300: (1.7428, 1.7139), 500: (1.3609, 1.3192), 800: (1.1586, 1.1307),
               1000: (1.1022, 1.0768), 1500: (1.0169, 0.9998), 2000: (0.9713, 0.9656), 2500: (0.9384, 0.9385), 2800: (0.9258, 0.9295)},
    "qtail": {100: (2.0292, 2.0078), 200: (1.6184, 1.5900), 300: (1.3416, 1.3009), 500: (1.1715, 1.1386), 800: (1.0726, 1.0494),
              1000: (1.0299, 1.0115), 1500: (0.9637, 0.9569)},
}  # fmt: skip
"""Schedule -> steps -> (train, test) in nats per byte."""
GOALS = {"qtail": (1500, 0.957, 0.945), "qconst": (2800, 0.930, 0.915)}
"""Schedule -> (steps, test loss that must be reached, test loss that is aimed at)."""
NAME_CHARACTERS = 44


def best_test(run: Trained) -> tuple[float, str]:
    """(test loss at the goal's step, of which weights); infinite if the run did not come so far."""
    steps = GOALS[run.schedule][0]
    for point in run.points:
        if point.step == steps:
            return min([(point.test, "last"), *((loss, name) for name, loss in point.averages.items())])
    return math.inf, ""


def goal_met(runs: Sequence[Trained]) -> bool:
    """Is the test loss that must be reached, reached in both schedules?"""
    best = {name: min((best_test(run)[0] for run in runs if run.schedule == name), default=math.inf) for name in SCHEDULES}
    return all(best[name] <= GOALS[name][1] for name in SCHEDULES)


def table_lines(runs: Sequence[Trained]) -> list[str]:
    """One block per schedule: test losses at the original's points; then train losses, averages and the whole held-out part at the end."""
    lines: list[str] = []
    for schedule in SCHEDULES:
        found = [run for run in runs if run.schedule == schedule]
        if found:
            lines += [*_curve_lines(schedule, found), "", *_end_lines(found), ""]
    for schedule, (steps, must, aim) in GOALS.items():
        reached = min(((*best_test(run), run.name) for run in runs if run.schedule == schedule), default=(math.inf, "", ""))
        if math.isfinite(reached[0]):
            verdict = "aim met" if reached[0] <= aim else "met" if reached[0] <= must else "NOT met"
            lines.append(f"{schedule} at {steps} steps: {reached[0]:.4f} ({reached[2]}, {reached[1]}); asked {must}, aim {aim}: {verdict}")
    return lines


def _curve_lines(schedule: str, runs: Sequence[Trained]) -> list[str]:
    steps = sorted({point.step for run in runs for point in run.points} | set(ORIGINAL[schedule]))
    lines = [_titled(f"{schedule}: test loss after steps", "".join(f"{step:>8}" for step in steps))]
    lines.append(_titled("the original", "".join(_cell(ORIGINAL[schedule].get(step, (0, None))[1]) for step in steps)))
    for run in runs:
        losses = {point.step: point.test for point in run.points}
        lines.append(_titled(_title(run), "".join(_cell(losses.get(step)) for step in steps)))
    return lines


def _end_lines(runs: Sequence[Trained]) -> list[str]:
    heads = f"{'train':>8}{'test':>8}{'+-':>7}{'whole':>8}{'to bf16':>9}{'ms/step':>9}  averages: test, whole"
    return [_titled(f"{runs[0].schedule}: at the end", heads), *(_titled(_title(run), _end_cells(run, runs)) for run in runs)]


def _end_cells(run: Trained, runs: Sequence[Trained]) -> str:
    if not run.points or not run.whole_test:
        return f"  {run.failure or 'stopped'}"
    last, whole = run.points[-1], run.whole_test["last"]
    equals = [other for other in runs if other.arithmetic == COMPILED and other.whole_test and other.points[-1].step == last.step]
    gap = f"{whole / equals[0].whole_test['last'] - 1:+.2%}" if equals else "-"
    averages = "  ".join(f"{name} {loss:.4f} {run.whole_test.get(name, math.nan):.4f}" for name, loss in last.averages.items())
    return f"{last.train:>8.4f}{last.test:>8.4f}{run.evaluation_error:>7.4f}{whole:>8.4f}{gap:>9}{run.step_ms:>9.1f}  {averages}"


def _title(run: Trained) -> str:
    return run.name.replace(f" {run.schedule}", "", 1)


def _titled(title: str, cells: str) -> str:
    return f"{title[:NAME_CHARACTERS]:<{NAME_CHARACTERS}}{cells}"


def _cell(loss: float | None) -> str:
    return f"{loss:>8.4f}" if loss is not None else f"{'-':>8}"
