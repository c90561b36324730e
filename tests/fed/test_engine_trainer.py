"""The trainer and the evaluator over the engine: what holds for the reference holds here too. (CPU: plain-torch operations, int8.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_run import BUDGET, make_data, make_recipe

from tscale_fed.assembly import build_evaluator, build_trainer, model_shape, start_weights
from tscale_fed.checkpoint import CheckpointStore
from tscale_fed.config import DeviceSection, EvalSection, Recipe
from tscale_fed.data.token_data import TokenData
from tscale_fed.device import Device, choose_device
from tscale_fed.engine.engine import Engine
from tscale_fed.engine.reference import ReferenceEngine
from tscale_fed.evaluate import Evaluator
from tscale_fed.trainer import Trainer
from tscale_net.errors import Refused
from tscale_net.ports import SystemClock

DROP_AND_NOISE = {"token_drop": 0.2, "noise_rows": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return make_data(tmp_path_factory.mktemp("text"))


def device(precision: str = "int8", micro_batch: int = 0) -> Device:
    return choose_device("cpu", DeviceSection(precision=precision, micro_batch=micro_batch))  # type: ignore[arg-type]


def trainer_of(data: TokenData, recipe: Recipe | None = None, where: Device | None = None, peer_id: str = "alice") -> Trainer:
    recipe = recipe or make_recipe()
    weights = start_weights(recipe, model_shape(recipe, data.vocab))
    lines: list[str] = []
    trainer = build_trainer(
        recipe, data, where or device(), weights, peer_id=peer_id, budget_batches=BUDGET, clock=SystemClock(), say=lines.append
    )
    assert len(lines) == isinstance(trainer.engine, Engine)
    return trainer


def evaluator_of(data: TokenData, where: Device) -> Evaluator:
    return build_evaluator(make_recipe(), data, EvalSection(fragments=2, batches=3), where, SystemClock())


def steps(trainer: Trainer, count: int) -> list[float]:
    return [trainer.step().loss for _ in range(count)]


def test_the_precision_chooses_the_engine(data: TokenData) -> None:
    assert isinstance(trainer_of(data).engine, Engine)
    assert isinstance(trainer_of(data, where=choose_device("cpu")).engine, ReferenceEngine)


def test_it_learns_like_the_reference(data: TokenData) -> None:
    got, want = steps(trainer_of(data), 30), steps(trainer_of(data, where=choose_device("cpu")), 30)
    assert sum(got[-5:]) < sum(got[:5]) - 2.0
    assert sum(got[-5:]) == pytest.approx(sum(want[-5:]), rel=0.03)


def test_ten_steps_equal_five_saved_restored_and_five_more(data: TokenData, tmp_path: Path) -> None:
    recipe = make_recipe(model=DROP_AND_NOISE)
    straight, first = trainer_of(data, recipe), trainer_of(data, recipe)
    losses = steps(straight, 10)
    assert steps(first, 5) == losses[:5]
    store = CheckpointStore(tmp_path, keep=1)
    store.save(first.steps, first.state_tensors(), {}, {"trainer": first.state_facts()})
    restored = trainer_of(data, recipe)
    found, _ = store.latest()
    assert found is not None
    restored.load_state(found.tensors, found.facts["trainer"])
    assert steps(restored, 5) == losses[5:]
    assert torch.equal(restored.weights, straight.weights)


def test_a_checkpoint_of_one_precision_goes_on_in_another(data: TokenData) -> None:
    reference = trainer_of(data, where=choose_device("cpu"))
    steps(reference, 5)
    engine = trainer_of(data)
    engine.load_state(reference.state_tensors(), reference.state_facts())
    assert steps(engine, 3) == pytest.approx(steps(reference, 3), rel=0.02)


def test_a_joiner_adopts_the_donor_state(data: TokenData) -> None:
    donor, joiner = trainer_of(data), trainer_of(data, peer_id="bob")
    steps(donor, 3)
    joiner.adopt(donor.donor_state())
    assert joiner.optimizer.own_steps == 3 and torch.equal(joiner.optimizer.moment_sums, donor.optimizer.moment_sums)


def test_weights_changed_by_a_meeting_are_trained_on(data: TokenData) -> None:
    a, b = trainer_of(data), trainer_of(data)
    steps(a, 2)
    b.load_state(a.state_tensors(), a.state_facts())
    for trainer in (a, b):
        trainer.weights[100:5000].add_(0.3)
    assert steps(a, 2) == steps(b, 2)


@pytest.mark.parametrize("where", [device(), device("bfloat16"), choose_device("cpu")], ids=["int8", "bfloat16", "float32"])
def test_micro_batches_change_next_to_nothing(data: TokenData, where: Device) -> None:
    recipe = make_recipe(batch={"fragments": 2, "accumulate": 2})
    settings = DeviceSection(micro_batch=1)
    small = Device(where.torch_device, where.precision, where.reason, settings)
    a, b = trainer_of(data, recipe, where), trainer_of(data, recipe, small)
    assert steps(a, 3) == pytest.approx(steps(b, 3), rel=5e-3)
    assert a.tokens == b.tokens


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(data: TokenData) -> None:
    trainer = trainer_of(data)
    trainer.step()
    trainer.engine.parameters.views["final"].detach()[0, 0] = float("nan")
    before = {name: tensor.numpy().tobytes() for name, tensor in trainer.state_tensors().items()}
    with pytest.raises(Refused) as caught:
        trainer.step()
    assert caught.value.code == "loss-not-finite" and "step 2" in caught.value.detail
    assert {name: tensor.numpy().tobytes() for name, tensor in trainer.state_tensors().items()} == before
    assert trainer.steps == 1


def test_the_evaluator_computes_in_the_precision_of_training(data: TokenData) -> None:
    trainer = trainer_of(data)
    steps(trainer, 10)
    before = trainer.weights.clone()
    by_engine, by_reference = evaluator_of(data, device()), evaluator_of(data, choose_device("cpu"))
    for split in ("test", "train"):
        got, want = by_engine.loss(trainer.weights, split), by_reference.loss(trainer.weights, split)  # type: ignore[arg-type]
        assert got.tokens == want.tokens and got.loss == pytest.approx(want.loss, rel=0.05)
        assert got.loss != want.loss
    assert by_engine.loss(trainer.weights).loss == by_engine.loss(trainer.weights.double()).loss
    assert torch.equal(trainer.weights, before)
