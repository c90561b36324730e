"""The gradient in parts: contiguous ranges of the flat gradient, in the order in which the backward pass finishes them.

The final layer comes first, then layers from the top, the embedding last. Neighbouring layers are joined until a part is large enough for
its exchange to run at full speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import ROW_NORMALISED
from tscale_fed.parallel.limits import BUCKET_ELEMENTS

Stage = int | str
"""A layer's number, "final" or "embedding"."""


@dataclass(frozen=True, slots=True)
class MatrixPlace:
    """flat[start : start + rows * columns]; its second moments begin at `moment`: one per row, or one in all."""

    name: str
    start: int
    rows: int
    columns: int
    moment: int
    per_row: bool

    @property
    def moments(self) -> int:
        return self.rows if self.per_row else 1

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Bucket:
    """flat[start : stop]; complete once `stages` are through."""

    stages: tuple[Stage, ...]
    matrices: tuple[MatrixPlace, ...]
    """In the order of the flat buffer."""

    @property
    def start(self) -> int:
        return self.matrices[0].start

    @property
    def stop(self) -> int:
        return self.matrices[-1].stop

    @property
    def elements(self) -> int:
        return self.stop - self.start

    @property
    def moments(self) -> slice:
        """Their second moments among all."""
        last = self.matrices[-1]
        return slice(self.matrices[0].moment, last.moment + last.moments)


def build_buckets(shape: ModelShape, least: int = BUCKET_ELEMENTS) -> list[Bucket]:
    """All parts, each of `least` elements if the model has as many layers below."""
    by_stage: dict[Stage, list[MatrixPlace]] = {}
    start = moment = 0
    for name, rows, columns in shape.tensors():
        place = MatrixPlace(name, start, rows, columns, moment, name in ROW_NORMALISED)
        stage: Stage = int(name.split(".")[1]) if name.startswith("layers.") else name
        by_stage.setdefault(stage, []).append(place)
        start, moment = place.stop, moment + place.moments
    buckets, joined = [Bucket(("final",), tuple(by_stage["final"]))], []
    for layer in reversed(range(len(shape.layers()))):
        joined.append(layer)
        bucket = _joined(joined, by_stage)
        if bucket.elements >= least or layer == 0:
            buckets.append(bucket)
            joined = []
    return [*buckets, Bucket(("embedding",), tuple(by_stage["embedding"]))]


def _joined(layers: Sequence[int], by_stage: dict[Stage, list[MatrixPlace]]) -> Bucket:
    """`layers` from the top; their matrices are in the order of the flat buffer, from the bottom."""
    return Bucket(tuple(layers), tuple(place for layer in sorted(layers) for place in by_stage[layer]))
