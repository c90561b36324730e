"""The memory plan: bytes that are those of the real buffers, and the choice from free memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tscale_fed.engine.buffers import Buffers
from tscale_fed.engine.gradients import Gradients, gradient_scratch_bytes
from tscale_fed.engine.layout import MAX_ROWS, Kind, Sizes
from tscale_fed.engine.memory_plan import MemoryPlan, buffer_bytes, choose_plan, engine_bytes, smaller
from tscale_fed.engine.packed import PackedWeights, packed_bytes
from tscale_fed.engine.precision import Precision
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_net.errors import Refused

INT8 = Precision("int8", "bfloat16", kernels=True)
SMALL = ModelShape.parse("e128h2d4w40relu2", 300, 4)
LARGE = ModelShape.parse("e1280h20d42w1024", 50257)
CPU = torch.device("cpu")


def plan_of(shape: ModelShape = LARGE, free_gb: float | None = 60, fragments: int = 24, **options: object) -> MemoryPlan:
    free_bytes = None if free_gb is None else int(free_gb * 1e9)
    return choose_plan(shape, fragments=fragments, tokens=1024, precision=INT8, free_bytes=free_bytes, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["keep", "recompute", "evaluate"])
@pytest.mark.parametrize("precision", [INT8, Precision("bfloat16"), Precision("fp8", "fp8"), Precision("int8", "int8")], ids=str)
def test_planned_bytes_are_real_bytes(kind: Kind, precision: Precision) -> None:
    sizes = Sizes(SMALL, 3, 50, precision, kind)
    assert sizes.rows == 256
    assert buffer_bytes(sizes) == Buffers(sizes, CPU).bytes
    train = kind != "evaluate"
    weights = PackedWeights(SMALL, precision.code, CPU, transposed=train)
    assert packed_bytes(SMALL, precision.code, transposed=train) == weights.bytes
    gradients = Gradients(SMALL, Parameters(SMALL))
    scratch = gradients.square_sums.numel() * 4 + gradients.workspace.numel() * 4
    assert gradient_scratch_bytes(SMALL) == scratch
    assert engine_bytes(sizes) == buffer_bytes(sizes) + weights.bytes + (scratch if train else 0)


def test_bfloat16_stream_takes_less() -> None:
    sizes = Sizes(SMALL, 3, 50, INT8)
    assert buffer_bytes(sizes) - buffer_bytes(replace(sizes, stream=torch.bfloat16)) == 2 * 2 * sizes.rows * SMALL.width


def test_a_large_card_takes_the_step_at_once() -> None:
    plan = plan_of(free_gb=70)
    assert (plan.sizes.fragments, plan.sizes.kind, plan.micro_batches) == (24, "keep", 1)
    assert str(plan).startswith("memory: 24 fragments of 1024 tokens at once, all states kept, ") and "of 70.0 GB free" in str(plan)


@pytest.mark.parametrize("free_gb", [70, 40, 30, 20, 16, 12, 10, 8, 7])
def test_every_choice_fits_and_shares_are_equal(free_gb: float) -> None:
    plan = plan_of(free_gb=free_gb)
    assert plan.bytes <= free_gb * 1e9 - (1 << 29)
    assert plan.micro_batches * plan.sizes.fragments - 24 < plan.micro_batches


def test_less_memory_never_means_larger_micro_batches() -> None:
    chosen = [plan_of(free_gb=free) for free in (70, 40, 30, 20, 16, 12, 10, 8, 7)]
    kept = [plan.sizes.fragments for plan in chosen if plan.sizes.kind == "keep"]
    recomputed = [plan.sizes.fragments for plan in chosen if plan.sizes.kind == "recompute"]
    assert kept == sorted(kept, reverse=True) and recomputed == sorted(recomputed, reverse=True) and recomputed


def test_a_full_card_is_refused_with_numbers() -> None:
    with pytest.raises(Refused) as caught:
        plan_of(free_gb=2)
    assert caught.value.code == "out-of-memory"
    for part in ("one fragment of 1024 tokens", "2.0 GB are free", "length in [batch]"):
        assert part in caught.value.detail


def test_the_processor_takes_everything_at_once() -> None:
    assert plan_of(SMALL, free_gb=None).sizes.fragments == 24


def test_micro_batch_is_an_upper_limit() -> None:
    plan = plan_of(free_gb=70, micro_batch=7)
    assert (plan.sizes.fragments, plan.micro_batches) == (6, 4)
    assert "4 x 6 fragments" in str(plan)


def test_exact_sums_limit_the_rows() -> None:
    assert plan_of(SMALL, free_gb=None, fragments=1000).sizes.rows <= MAX_ROWS
    with pytest.raises(Refused) as caught:
        choose_plan(SMALL, fragments=1, tokens=MAX_ROWS + 1, precision=INT8, free_bytes=None)
    assert caught.value.code == "bad-config" and "[batch] length" in caught.value.detail


def test_smaller_plans_end() -> None:
    plan: MemoryPlan | None = plan_of(free_gb=70)
    seen = []
    while plan is not None:
        seen.append((plan.sizes.fragments, plan.sizes.kind))
        plan = smaller(plan)
    assert seen == [(24, "keep"), (12, "keep"), (6, "keep"), (3, "keep"), (2, "keep"), (1, "keep"), (1, "recompute")]
