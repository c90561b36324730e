"""Whose measurement of the basepoint is shown."""

from __future__ import annotations

import math

from test_small_parts import record

from tscale_peers.measured import NOT_MEASURED, Measured, newest


def test_the_measurement_of_the_latest_basepoint_is_shown() -> None:
    others = [record(2, eval_batches=40, eval_loss=2.0), record(3, eval_batches=50, eval_loss=1.9, average_loss=1.8), record(4)]
    own = Measured(45, 1.95, math.nan)
    assert newest(own, others) == Measured(50, 1.9, 1.8, others[1].name)
    assert newest(Measured(50, 1.95, math.nan), others).by == ""
    assert newest(NOT_MEASURED, others[:1]).loss == 2.0
    assert not newest(NOT_MEASURED, [record(5)]).known


def test_of_equal_measurements_the_order_of_records_does_not_matter() -> None:
    one, two = record(6, eval_batches=9, eval_loss=1.0, name="one"), record(7, eval_batches=9, eval_loss=1.1, name="two")
    assert newest(NOT_MEASURED, [one, two]) == newest(NOT_MEASURED, [two, one])
