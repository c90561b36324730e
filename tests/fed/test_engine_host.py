"""CPU offload on the processor: the bits of the device's update of the same gradient, micro-batches, changed weights, broken numbers."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engine_twenty_steps import DOC_START, FRAGMENTS, RATE, TOKENS, batch_of, make, shape
from training_run import make_data, make_recipe

from tscale_fed.assembly import build_trainer, model_shape, start_weights
from tscale_fed.config import DeviceSection
from tscale_fed.device import choose_device
from tscale_fed.engine import host_gradients, host_memory, host_pack, host_tensors, place
from tscale_fed.engine.build import build_engine
from tscale_fed.engine.engine import Engine
from tscale_fed.engine.host_engine import HostEngine, device_bytes
from tscale_fed.engine.host_memory import host_bytes
from tscale_fed.engine.host_pack import pack_from_host, usable_cores
from tscale_fed.engine.host_parameters import HostParameters
from tscale_fed.engine.host_tensors import HostTensors
from tscale_fed.engine.interface import StepBatch
from tscale_fed.engine.layout import Sizes
from tscale_fed.engine.memory_plan import engine_bytes
from tscale_fed.engine.packed import PackedWeights
from tscale_fed.engine.precision import choose_precision
from tscale_fed.model.init import initialise
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import Optimizer, OptimizerSettings
from tscale_kernels import host_update
from tscale_kernels.optimizer_step import ALL_FINITE
from tscale_net.errors import Refused
from tscale_net.ports import SystemClock

SETTINGS = OptimizerSettings(rate=RATE, warmup_batches=0, l2=0.05)
BIG = ModelShape.parse("e1280h20d42w1024", vocab=50257)


def host_engine(precision: str = "int8", **options: Any) -> HostEngine:
    where = torch.device("cpu")
    masters = HostParameters(shape(), HostTensors(pin=False))
    masters.load(initialise(shape(), 1))
    chosen, _ = choose_precision(where, precision, "auto")
    return HostEngine(
        masters, Optimizer(masters, SETTINGS), None, device=where, precision=chosen, fragments=FRAGMENTS, tokens=TOKENS,
        doc_start_token=DOC_START, **options,
    )  # fmt: skip


def device_engine(precision: str = "int8", **options: Any) -> Engine:
    return build_engine(
        shape(), initialise(shape(), 1), device="cpu", precision=precision, fragments=FRAGMENTS, tokens=TOKENS, doc_start_token=DOC_START,
        settings=SETTINGS, **options,
    )  # fmt: skip


def step_with_bf16_gradient(engine: Engine, step: StepBatch, rate: float) -> float:
    """A step of the device whose gradient is rounded as it would be on its way to host memory."""
    loss = engine.accumulate(step)
    gradient = engine.parameters.flat_grad
    gradient.copy_(gradient.bfloat16())
    engine._update.launch(rate, torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    assert engine._update.verdict(int(engine._update.bad_matrix)) is None
    return loss


class State(NamedTuple):
    weights: torch.Tensor
    momentum: torch.Tensor
    moment_sums: torch.Tensor
    counts: tuple[int, float]


def state(engine: Engine) -> State:
    o = engine.optimizer
    return State(engine.weights.clone(), o.momentum.clone(), o.moment_sums.clone(), (o.own_steps, o.moment_count))


def assert_same(got: State, want: State) -> None:
    for name, a, b in zip(State._fields[:3], got[:3], want[:3], strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32)), f"{name}: {int((a != b).sum())} of {a.numel()} differ"
    assert got.counts == want.counts


# -- the same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "bfloat16", "fp8"])
def test_steps_have_the_bits_of_the_devices_update_of_the_same_gradient(precision: str) -> None:
    on_device, in_host = device_engine(precision), host_engine(precision)
    for number in range(3):
        want = step_with_bf16_gradient(on_device, batch_of(number), RATE / (1 + number))
        assert in_host.step(batch_of(number), RATE / (1 + number)) == want
        assert_same(state(in_host), state(on_device))
    # The codes that the next forward pass reads, those of every matrix and their transposed copies.
    on_device._weights.pack(on_device.weights)
    for name in ("_codes", "_codes_t", "units"):
        got, want_codes = (getattr(each._weights, name).view(torch.uint8) for each in (in_host, on_device))
        assert torch.equal(got, want_codes), name
    assert torch.equal(in_host._table, on_device.parameters.views["embedding"])
    in_host.close()


@pytest.mark.parametrize("options", [{"host_backend": "torch"}, {"threaded": False}, {"plan": "recompute"}, {"threads": 2}])
def test_how_it_is_computed_makes_no_difference(options: dict[str, Any]) -> None:
    one, other = host_engine(), host_engine(**options)
    for number in range(2):
        assert one.step(batch_of(number), RATE) == other.step(batch_of(number), RATE)
    assert_same(state(one), state(other))


def test_twenty_losses_are_those_of_the_device() -> None:
    on_device, in_host = device_engine(), host_engine()
    for number in range(20):
        assert in_host.step(batch_of(number), RATE) == pytest.approx(on_device.step(batch_of(number), RATE), rel=5e-3)


def test_micro_batches_add_up_in_host_memory() -> None:
    """The gradient of a step in four is the sum of its parts, each rounded to bf16, each sum rounded once."""
    whole, parts = host_engine(), host_engine(micro_batch=1)
    assert parts.plan.micro_batches == FRAGMENTS
    batch = batch_of(0)
    parts.step(batch, RATE)
    got = parts.parameters.flat_grad.float()
    whole.accumulate(batch)
    exact = whole.parameters.flat_grad.float()
    assert (got - exact).norm() < 0.05 * exact.norm()  # each part is quantised with scales of its own
    for number in range(1, 6):
        losses = [engine.step(batch_of(number), RATE) for engine in (whole, parts)] if number > 1 else [whole.step(batch, RATE)] * 2
        assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_the_gradient_alone_leaves_weights_and_optimizer_alone() -> None:
    engine = host_engine()
    before = state(engine)
    on_device = device_engine()
    assert engine.accumulate(batch_of(0)) == on_device.accumulate(batch_of(0))
    assert_same(state(engine), before)
    assert torch.equal(engine.parameters.flat_grad, on_device.parameters.flat_grad.bfloat16())


# -- weights that others change ----------------------------------------------------------------------------------------


def test_changed_weights_are_seen_by_the_next_step() -> None:
    on_device, in_host = device_engine(), host_engine()
    for engine in (on_device, in_host):
        engine.weights[100:5000].mul_(1.5)
        with torch.no_grad():
            engine.parameters.views["final"][3:9] = 1.0
    assert in_host.loss(batch_of(1)) == on_device.loss(batch_of(1))
    for number in range(2):
        assert in_host.step(batch_of(number), RATE) == step_with_bf16_gradient(on_device, batch_of(number), RATE)
        for engine in (on_device, in_host):
            engine.weights.mul_(0.99)
    assert_same(state(in_host), state(on_device))


def test_codes_are_made_anew_only_if_somebody_changed_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = host_engine()
    engine.step(batch_of(0), RATE)
    monkeypatch.setattr(host_update, "weight_squares_of", lambda *_: pytest.fail("codes were made anew"))
    engine.step(batch_of(1), RATE)


def test_a_trainer_with_weights_in_host_memory_is_restored_to_the_bit(tmp_path: Path) -> None:
    data, recipe = make_data(tmp_path), make_recipe()
    device = choose_device("cpu", DeviceSection(precision="int8", optimizer_memory="host"))
    weights = start_weights(recipe, model_shape(recipe, data.vocab))

    def trainer() -> Any:
        return build_trainer(recipe, data, device, weights, peer_id="alice", budget_batches=50, clock=SystemClock())

    one, other = trainer(), trainer()
    assert isinstance(one.engine, HostEngine) and one.weights.device.type == "cpu" and one.weights.dtype == torch.float32
    for _ in range(3):
        one.step()
    other.load_state(one.state_tensors(), one.state_facts())
    assert one.step().loss == other.step().loss
    assert torch.equal(one.weights, other.weights)


# -- broken numbers and errors -----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    engine = host_engine()
    engine.step(batch_of(0), RATE)
    with torch.no_grad():
        engine.parameters.views["embedding"][:] = float("inf")
    before = state(engine)
    with pytest.raises(Refused) as refused:
        engine.step(batch_of(1), RATE)
    assert refused.value.code == "loss-not-finite"
    assert_same(state(engine), before)


def test_an_overflow_in_the_backward_pass_keeps_all_weights_finite_and_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = host_engine()
    engine.step(batch_of(0), RATE)
    original = host_gradients.HostGradients.finish_stage

    def overflow(self: Any, stage: Any, buffers: Any) -> None:
        original(self, stage, buffers)
        if stage == 0:
            self.guard.fill_(math.inf)
            self.sent(stage).fill_(7.0)

    monkeypatch.setattr(host_gradients.HostGradients, "finish_stage", overflow)
    before = state(engine)
    with pytest.raises(Refused, match=r"layers\.0\.ffn_down"):
        engine.step(batch_of(1), RATE)
    after = state(engine)
    assert bool(after.weights.isfinite().all()) and after.counts == before.counts
    spans = engine.parameters.spans
    assert torch.equal(after.weights[slice(*spans["layers.0.combiner"])], before.weights[slice(*spans["layers.0.combiner"])])
    assert torch.equal(after.weights[slice(*spans["embedding"])], before.weights[slice(*spans["embedding"])])
    assert not torch.equal(after.weights[slice(*spans["final"])], before.weights[slice(*spans["final"])])


def test_an_error_of_the_host_thread_is_raised_by_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = host_engine()

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr(host_memory.host_update, "update", fail)
    with pytest.raises(ZeroDivisionError, match="of the test"):
        engine.step(batch_of(0), RATE)
    monkeypatch.undo()
    assert math.isfinite(engine.step(batch_of(0), RATE))


def test_a_machine_without_room_is_told_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Little(NamedTuple):
        available: int = 3 << 30

    monkeypatch.setattr(host_tensors.psutil, "virtual_memory", Little)
    HostTensors(pin=False).zeros(1000, torch.float32)
    with pytest.raises(Refused, match="optimizer_memory") as refused:
        HostTensors(pin=False).zeros(1 << 30, torch.float32)
    assert refused.value.code == "out-of-memory" and "\n" not in str(refused.value)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_bytes_of_host_memory_are_as_told() -> None:
    engine = host_engine()
    engine.step(batch_of(0), RATE)
    told, taken = host_bytes(shape(), torch.int8), engine._masters.memory.bytes
    assert 0 <= taken - told < 0.01 * told
    assert host_bytes(BIG, torch.int8) / BIG.trained_parameters < 11.0
    assert host_bytes(BIG, torch.int8, micro_batches=20) / BIG.trained_parameters < 11.4


def test_the_big_model_fits_twelve_gigabytes() -> None:
    """24 x 1024 tokens of the 1.5B model, states recomputed, the rest in host memory; 0.6 GB for CUDA itself."""
    chosen, _ = choose_precision(torch.device("cpu"), "int8", "auto")
    assert engine_bytes(Sizes(BIG, 24, 1024, chosen, "recompute")) + device_bytes(BIG) < 12.2e9


@pytest.mark.parametrize(
    ("requested", "free", "want"),
    [("host", None, "host"), ("auto", None, "device"), ("device", int(24e9), "device"), ("auto", int(80e9), "device"),
     ("auto", int(24e9), "host"), ("auto", int(2e9), "device")],
)  # fmt: skip
def test_the_place_follows_what_is_free(requested: str, free: int | None, want: str) -> None:
    chosen, _ = choose_precision(torch.device("cpu"), "int8", "auto")
    assert place.choose_place(requested, BIG, fragments=24, tokens=1024, precision=chosen, free=free) == want


def test_a_place_that_does_not_exist() -> None:
    chosen, _ = choose_precision(torch.device("cpu"), "int8", "auto")
    with pytest.raises(ValueError, match="auto, device or host"):
        place.choose_place("disk", BIG, fragments=1, tokens=128, precision=chosen, free=None)


def test_cores_are_those_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(host_pack, "CONTAINER_QUOTA", quota)
    free = usable_cores()
    assert free >= 1
    for text, want in (("max 100000", free), ("100000 100000", 1), ("50000 100000", 1), ("9900000 100000", free)):
        quota.write_text(text + "\n")
        assert usable_cores() == want


def test_every_weight_belongs_to_one_piece() -> None:
    engine = host_engine()
    pieces = [piece for pieces in engine._memory._pieces.values() for piece in pieces]
    segments = sorted((s for piece in pieces for s in piece.segments), key=lambda s: s.start)
    assert segments[0].start == 0 and segments[-1].stop == shape().trained_parameters
    assert all(a.stop == b.start for a, b in zip(segments, segments[1:], strict=False))
    assert sum(s.moments for s in segments) == engine.optimizer.moment_sums.numel()
    names = [name for name, _, _ in shape().tensors()]
    assert sorted(set(s.name for s in segments)) == sorted(names)
    assert isinstance(make("cpu", "int8"), Engine)
    assert ALL_FINITE > len(names)


@pytest.mark.parametrize("transposed", [True, False])
def test_packing_from_host_memory_is_packing(transposed: bool) -> None:
    flat, made = initialise(shape(), 3), []
    for from_host in (False, True):
        weights = PackedWeights(shape(), torch.int8, torch.device("cpu"), transposed=transposed)
        table = torch.zeros(shape().embedding_rows, shape().width)
        if from_host:
            pack_from_host(flat, shape(), weights, table, host_update.choose_host(1))
            assert torch.equal(table.flatten(), flat[: table.numel()])
        else:
            weights.pack(flat)
        made.append(weights)
    for name in ("_codes", "_codes_t", "units"):
        assert torch.equal(getattr(made[0], name), getattr(made[1], name)), name


@pytest.mark.parametrize("closed", [False, True])
def test_an_engine_that_is_let_go_leaves_no_thread_and_no_memory(closed: bool) -> None:
    engine = host_engine()
    engine.step(batch_of(0), RATE)
    thread, gone = engine._memory._thread, weakref.ref(engine._memory)
    assert thread is not None and thread.is_alive()
    if closed:
        engine.close()
    del engine
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive() and gone() is None
