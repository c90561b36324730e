"""Whole steps of the engine on the processor: against the reference, in micro-batches, with too little memory, with broken numbers."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from engine_model import cosines
from engine_twenty_steps import DOC_START, FRAGMENTS, RATE, TOKENS, batch_of, losses, make, shape

from tscale_fed.engine import engine as engine_module
from tscale_fed.engine.buffers import Buffers, document_starts, layer_seeds
from tscale_fed.engine.build import build_engine
from tscale_fed.engine.engine import Engine
from tscale_fed.engine.finite import stage_names
from tscale_fed.engine.precision import Precision
from tscale_fed.engine.scorer import Scorer
from tscale_fed.model.init import initialise
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import Optimizer, OptimizerSettings
from tscale_net.errors import Refused


def engine(precision: str = "int8", **options: Any) -> Engine:
    made = make("cpu", precision, **options)
    assert isinstance(made, Engine)
    return made


@functools.cache
def after_three_steps(precision: str, micro_batch: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Weights, state of the optimizer."""
    made = engine(precision, micro_batch=micro_batch)
    losses(made, 3)
    return made.weights.clone(), copy.deepcopy(made.optimizer.state_dict())


def trained(precision: str = "int8", micro_batch: int = 0) -> Engine:
    """An engine whose matrices are no longer zero."""
    made = engine(precision, micro_batch=micro_batch)
    weights, state = after_three_steps(precision, micro_batch)
    made.weights.copy_(weights)
    made.optimizer.load_state_dict(copy.deepcopy(state))
    return made


@pytest.fixture(scope="module")
def reference_losses() -> list[float]:
    return losses(make("cpu", "float32"))


@pytest.mark.parametrize(("precision", "limit"), [("bfloat16", 1e-3), ("int8", 0.02), ("fp8", 0.01)])
def test_twenty_losses_are_those_of_the_reference(precision: str, limit: float, reference_losses: list[float]) -> None:
    want, got = reference_losses, losses(engine(precision))
    assert want[-1] < 0.3 * want[0]
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=limit)


def test_a_step_is_the_gradient_and_the_optimizers_rule() -> None:
    made, step = trained(), batch_of(3)
    parameters = Parameters(shape()).load(made.weights)
    optimizer = Optimizer(parameters, made.optimizer.settings)
    optimizer.load_state_dict(made.optimizer.state_dict())
    made.accumulate(step)
    parameters.flat_grad.copy_(made.parameters.flat_grad)
    optimizer.step(RATE)
    made.step(step, RATE)
    assert torch.allclose(made.weights, parameters.flat, atol=1e-6)
    assert torch.allclose(made.optimizer.momentum, optimizer.momentum, atol=1e-5)
    assert torch.allclose(made.optimizer.moment_sums, optimizer.moment_sums, rtol=1e-4)
    assert (made.optimizer.own_steps, made.optimizer.moment_count) == (optimizer.own_steps, optimizer.moment_count)


def test_equal_engines_give_equal_bits() -> None:
    a, b = engine(), engine()
    assert losses(a, 3) == losses(b, 3)
    assert losses(a, 2) == losses(b, 2)
    assert torch.equal(a.weights, b.weights)


def test_sums_of_squares_of_the_optimizer_give_the_same_codes() -> None:
    made = engine()
    losses(made, 3)
    assert made._squares_known()
    made._weights.pack(made.weights, squares_known=True)
    known = [made._weights.units.clone(), made._weights.layers[2].combiner.codes.clone(), made._weights.final.codes.clone()]
    made._weights.pack(made.weights)
    fresh = [made._weights.units, made._weights.layers[2].combiner.codes, made._weights.final.codes]
    assert all(torch.equal(a, b) for a, b in zip(known, fresh, strict=True))
    made.weights[7:9].add_(0.1)
    assert not made._squares_known()
    made.step(batch_of(3), RATE)
    assert made._squares_known()


def test_changed_weights_are_seen_by_the_next_step() -> None:
    made = trained()
    before = made.loss(batch_of(7))
    made.weights.mul_(1.5)
    assert made.loss(batch_of(7)) != before


# -- micro-batches and plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "micro_batch", "limit"), [("int8", 1, 0.999), ("int8", 3, 0.999), ("bfloat16", 2, 0.99999), ("bfloat16", 3, 0.99999)]
)
def test_any_split_gives_the_same_arithmetic(precision: str, micro_batch: int, limit: float) -> None:
    whole = trained(precision)
    parts = engine(precision, micro_batch=micro_batch)
    parts.weights.copy_(whole.weights)
    assert parts.plan.micro_batches == -(-FRAGMENTS // parts.plan.sizes.fragments) > 1
    assert parts.accumulate(batch_of(5)) == pytest.approx(whole.accumulate(batch_of(5)), rel=1e-6)
    found = cosines(parts.parameters.grads, whole.parameters.grads)
    assert min(found.values()) > limit, sorted(found.items(), key=lambda each: each[1])[:3]


@pytest.mark.parametrize("precision", ["int8", "bfloat16", "fp8"])
def test_recomputed_states_give_the_same_bits(precision: str) -> None:
    keep, recompute = engine(precision), engine(precision, plan="recompute")
    assert recompute.plan.sizes.kind == "recompute" and recompute.plan.bytes < keep.plan.bytes
    assert losses(keep, 4) == losses(recompute, 4)
    assert torch.equal(keep.weights, recompute.weights)
    assert torch.equal(keep.parameters.flat_grad, recompute.parameters.flat_grad)


def test_a_batch_smaller_than_planned_is_filled_up() -> None:
    whole, few = trained(), trained(micro_batch=3)
    few.weights.copy_(whole.weights)
    part = batch_of(5).part(0, 1)
    assert few.accumulate(part) == pytest.approx(whole.accumulate(part), rel=1e-6)


def test_fragments_that_do_not_fill_rows() -> None:
    """3 x 50 tokens in 256 rows: what fills up adds nothing."""
    text, target = batch_of(0).text[:3, :50], batch_of(0).target[:3, :50]
    results = []
    for length, fragments in ((50, 3), (50, 5)):
        made = build_engine(shape(), initialise(shape(), 5), device="cpu", precision="int8", fragments=fragments, tokens=length)
        results.append(made.loss(engine_module.StepBatch.make(shape(), text, target)))
    assert results[0] == pytest.approx(results[1], rel=1e-7)


def test_other_lengths_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="built for"):
        engine().accumulate(batch_of(0)._replace(text=batch_of(0).text[:, :10]))


def test_full_memory_halves_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    real = Buffers.__init__

    def tight(self: Buffers, sizes: Any, device: torch.device) -> None:
        if sizes.fragments > 1:
            raise torch.OutOfMemoryError("made up")
        real(self, sizes, device)

    monkeypatch.setattr(Buffers, "__init__", tight)
    made = build_engine(
        shape(), initialise(shape(), 5), device="cpu", precision="int8", fragments=FRAGMENTS, tokens=TOKENS, doc_start_token=DOC_START,
        say=lines.append,
    )  # fmt: skip
    made.accumulate(batch_of(0))
    assert made.plan.sizes.fragments == 1
    assert [line.split(" ")[:5] for line in lines[1:]] == [["cpu:", "memory", "ran", "out", "with"]] * 2
    assert "now memory: 4 x 1 fragment" in lines[-1] and len(lines) == 3


def test_no_memory_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Buffers, sizes: Any, device: torch.device) -> None:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    monkeypatch.setattr(Buffers, "__init__", full)
    with pytest.raises(Refused) as caught:
        engine().accumulate(batch_of(0))
    assert caught.value.code == "out-of-memory" and "one fragment of 32 tokens" in caught.value.detail


def test_other_errors_are_not_taken_for_full_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Buffers, sizes: Any, device: torch.device) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(Buffers, "__init__", broken)
    with pytest.raises(RuntimeError, match="something else"):
        engine().accumulate(batch_of(0))


# -- numbers that break ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "words", "micro_batch"),
    [
        ("layers.1.combiner", math.nan, "weights of layer 2, combiner", 0),
        ("layers.1.combiner", math.nan, "weights of layer 2, combiner", 2),
        ("layers.2.key", math.inf, "weights of layer 3, key", 0),
        ("final", math.nan, "weights of the final layer", 0),
        ("embedding", math.nan, "embedding", 0),
        ("embedding", math.inf, "embedding", 2),
    ],
)
def test_broken_weights_stop_the_step_and_are_named(name: str, value: float, words: str, micro_batch: int) -> None:
    made = trained(micro_batch=micro_batch)
    step = batch_of(3)
    row = int(step.labels[0, 1, 0]) if name == "embedding" else 0
    made.parameters.views[name].detach()[row, 0] = value
    weights, state = made.weights.clone(), made.optimizer.state_dict()
    with pytest.raises(Refused) as caught:
        made.step(step, RATE)
    assert caught.value.code == "loss-not-finite"
    assert words in caught.value.detail and "at step 4" in caught.value.detail
    assert torch.equal(made.weights.nan_to_num(7.0), weights.nan_to_num(7.0))
    after = made.optimizer.state_dict()
    assert all(torch.equal(after[key], state[key]) for key in state)


def test_a_broken_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trained()
    _, _, passes = made._prepared(batch_of(3))
    real = passes.run

    def spoiled(accumulate: bool) -> None:
        real(accumulate)
        made.parameters.grads["embedding"][5, 3] = math.nan

    monkeypatch.setattr(passes, "run", spoiled)
    weights, steps = made.weights.clone(), made.optimizer.own_steps
    with pytest.raises(Refused, match="gradient of embedding is not finite at step 4"):
        made.step(batch_of(3), RATE)
    assert torch.equal(made.weights, weights) and made.optimizer.own_steps == steps


def test_training_goes_on_after_a_repair() -> None:
    made, other = trained(), trained()
    keep = made.weights.clone()
    made.weights[:] = math.nan
    with pytest.raises(Refused):
        made.step(batch_of(3), RATE)
    made.weights.copy_(keep)
    assert made.step(batch_of(3), RATE) == other.step(batch_of(3), RATE)
    assert torch.equal(made.weights, other.weights)


def test_every_stage_has_a_name() -> None:
    made = trained()
    made.step(batch_of(3), RATE)
    _, check, _ = made._prepared(batch_of(0))
    assert len(stage_names(4)) == check.peaks.numel()
    assert stage_names(2)[-1].startswith("gradient of layer 1")
    assert bool((check.peaks > 0).all())


# -- pieces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_the_scorer_measures_what_training_sees(precision: str) -> None:
    made = trained(precision)
    batch = engine_module.StepBatch.make(shape(), *batch_of(4)[:2])
    scorer = Scorer(
        shape(), None, Precision(precision), torch.device("cpu"), fragments=FRAGMENTS + 1, tokens=TOKENS, doc_start_token=DOC_START  # type: ignore[arg-type]
    )  # fmt: skip
    scorer.load(made.weights)
    assert float(scorer.loss(batch.text, batch.target)) == pytest.approx(made.loss(batch), rel=1e-7)
    with pytest.raises(ValueError, match="do not fit"):
        scorer.load(made.weights[1:])


def test_document_starts() -> None:
    text = torch.tensor([[9, 1, 3, 1, 3, 3, 1], [3, 1, 1, 1, 1, 1, 3]])
    assert document_starts(text, 3).tolist() == [[0, 0, 2, 2, 4, 5, 5], [0, 0, 0, 0, 0, 0, 6]]


def test_noise_seeds_differ() -> None:
    seeds = [int(seed) for step in (1, 2) for micro_batch in range(3) for seed in layer_seeds(step, micro_batch, 50)]
    assert len(set(seeds)) == len(seeds)
    assert layer_seeds((1 << 63) - 1, 0, 2).dtype == torch.int32


def test_a_model_of_one_layer_and_no_noise() -> None:
    small = ModelShape.parse("e128h1d1w8", 19)
    made = build_engine(
        small, initialise(small, 1), device="cpu", precision="int8", fragments=2, tokens=20, settings=OptimizerSettings(warmup_batches=0)
    )
    text = torch.randint(19, (2, 20), generator=torch.Generator().manual_seed(1))
    batch = engine_module.StepBatch.make(small, text, text.roll(-1, 1))
    first = made.step(batch, 0.01)
    for _ in range(8):
        last = made.step(batch, 0.01)
    assert last < first
