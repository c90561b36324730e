"""The curves as a picture. Needs matplotlib, which is an optional extra (`pip install -e '.[plot]'`).

Enters: samples, a file to write. Leaves: a PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tscale_fed.sim.curves import AXES
from tscale_fed.sim.outcome import Sample

INCHES = (15.0, 4.5)
DOTS_PER_INCH = 100


def can_draw() -> bool:
    """Is matplotlib installed?"""
    return find_spec("matplotlib") is not None


def write_figure(samples: Sequence[Sample], unit: str, title: str, path: Path) -> None:
    """Loss over time, bytes and tokens, side by side. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    for place, axis in enumerate(AXES, start=1):
        plot = figure.add_subplot(1, len(AXES), place)
        plot.plot([axis.value(sample) for sample in samples], [sample.loss for sample in samples])
        plot.set_xlabel(axis.label)
        plot.set_ylabel(f"held-out loss, {unit}")
        plot.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=DOTS_PER_INCH)
