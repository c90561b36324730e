"""Drawing: numbers in, characters out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tscale_fed.status import LossPoint
from tscale_fed.tui.drawing import NO_CURVE, SWARM, TRAIN, fit, loss_curve, zoom


def lines(points: list[LossPoint], columns: int, rows: int) -> list[str]:
    curve = loss_curve(points, columns, rows)
    assert curve is not None
    return ["".join(character for character, _ in cells) for cells in curve.cells]


def test_a_falling_line_goes_from_top_left_to_bottom_right() -> None:
    drawn = lines([LossPoint(0, 8.0), LossPoint(7, 1.0)], 4, 2)
    assert drawn == ["⠑⢄  ", "  ⠑⢄"]


def test_a_flat_line_and_a_single_point() -> None:
    curve = loss_curve([LossPoint(0, 2.0), LossPoint(9, 2.0)], 3, 1)
    assert curve is not None and curve.low < 2.0 < curve.high
    assert all(character != " " for character, _ in curve.cells[0])
    assert sum(character != " " for character in lines([LossPoint(5, 2.0)], 3, 1)[0]) == 1


def test_nothing_to_draw() -> None:
    assert loss_curve([], 10, 3) is None and loss_curve([LossPoint(1)], 10, 3) is None
    assert loss_curve([LossPoint(1, 2.0)], 0, 3) is None and loss_curve([LossPoint(1, 2.0)], 10, -1) is None


def test_gaps_are_bridged_and_colours_belong_to_the_curves() -> None:
    points = [LossPoint(step, 4.0, 1.0 if step in (0, 99) else None) for step in range(100)]
    curve = loss_curve(points, 20, 4)
    assert curve is not None
    assert {layer for _, layer in curve.cells[0]} == {TRAIN} and {layer for _, layer in curve.cells[-1]} == {SWARM}
    assert {layer for _, layer in curve.cells[1]} == {NO_CURVE}


loss = st.none() | st.floats(0, 50, allow_nan=False)
points = st.lists(st.builds(LossPoint, st.integers(0, 10**7), loss, loss), max_size=60)


@given(points, st.integers(1, 80), st.integers(1, 20))
def test_any_curve_has_the_size_asked_for(series: list[LossPoint], columns: int, rows: int) -> None:
    curve = loss_curve(series, columns, rows)
    if curve is None:
        assert all(point.train is None and point.swarm is None for point in series)
        return
    assert len(curve.cells) == rows and all(len(cells) == columns for cells in curve.cells)
    assert any(character != " " for cells in curve.cells for character, _ in cells)


@given(points, st.sampled_from([1.0, 0.5, 0.1]))
def test_zoom_keeps_the_newest(series: list[LossPoint], fraction: float) -> None:
    kept = zoom(series, fraction)
    assert len(kept) >= min(len(series), 2) and (not series or max(p.step for p in series) in [p.step for p in series])


def test_fit_drops_the_least_important_parts() -> None:
    assert fit(["ab", "cd", "ef"], 6) == "ab  cd" and fit(["ab", "cd", "ef", "g"], 10) == "ab  cd  ef" and fit([], 5) == ""
    assert fit(["ab", "cde"], 5) == "ab  c" and fit(["abc"], 2) == "ab", "the first two are cut"
