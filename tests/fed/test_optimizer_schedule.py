"""Learning-rate schedule: warm-up and tail by the swarm's batches, join warm-up by own steps."""

import pytest

from tscale_fed.optimizer.rule import OptimizerSettings
from tscale_fed.optimizer.schedule import rate


def test_warm_up_then_constant() -> None:
    settings = OptimizerSettings(rate=0.02, warmup_batches=10)
    assert [rate(settings, done, 100) for done in (0, 4, 9, 10, 99, 500)] == pytest.approx([0.002, 0.01, 0.02, 0.02, 0.02, 0.02])
    assert rate(OptimizerSettings(rate=0.02, warmup_batches=0), 0, 100) == 0.02


def test_tail_falls_over_the_last_part_of_the_budget() -> None:
    settings = OptimizerSettings(rate=0.01, warmup_batches=0, tail=5)
    assert [rate(settings, done, 100) for done in (0, 80, 90, 99, 100, 120)] == pytest.approx([0.01, 0.01, 0.005, 0.0005, 0.0, 0.0])


def test_tail_needs_a_budget() -> None:
    with pytest.raises(ValueError, match="budget_batches"):
        rate(OptimizerSettings(tail=5), 0, 0)
    assert rate(OptimizerSettings(warmup_batches=0), 7, 0) == 0.01


def test_a_joiner_warms_up_by_its_own_steps() -> None:
    settings = OptimizerSettings(rate=0.01, warmup_batches=0, join_warmup_steps=4)
    assert [rate(settings, 1000, 2000, steps) for steps in (0, 1, 3, 50)] == pytest.approx([0.0025, 0.005, 0.01, 0.01])
    assert rate(settings, 0, 2000) == 0.01
