"""The trainer: steps, accumulation, rates, and a state that restores bit for bit."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from training_run import BUDGET, make_data, make_recipe, make_trainer

from tscale_fed.checkpoint import CheckpointStore
from tscale_fed.data.token_data import TokenData
from tscale_fed.trainer import Trainer
from tscale_net.errors import Refused


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return make_data(tmp_path_factory.mktemp("text"))


def steps(trainer: Trainer, count: int) -> list[float]:
    return [trainer.step().loss for _ in range(count)]


def bits(trainer: Trainer) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in trainer.state_tensors().items()}


def same_float(a: float, b: float) -> bool:
    return struct.pack("d", a) == struct.pack("d", b)


def test_it_learns(data: TokenData) -> None:
    losses = steps(make_trainer(data), 30)
    assert sum(losses[-5:]) < sum(losses[:5]) - 2.0


def test_a_step_reports_what_it_did(data: TokenData) -> None:
    trainer = make_trainer(data)
    first, second = trainer.step(), trainer.step()
    assert (first.step, second.step) == (1, 2)
    assert first.tokens == 2 * 15  # the first token of each fragment has no target
    assert (trainer.steps, trainer.tokens, trainer.swarm_batches) == (2, 60, 2)
    assert trainer.loss_average == pytest.approx((first.loss + second.loss) / 2)
    assert first.rate == pytest.approx(0.02 / 4) and second.rate == pytest.approx(0.02 / 2)


@pytest.mark.parametrize("model", [{}, {"token_drop": 0.3, "noise_rows": 4}], ids=["plain", "drop and noise"])
def test_two_trainers_with_one_peer_id_are_bit_equal(data: TokenData, model: dict[str, float]) -> None:
    recipe = make_recipe(model=model)
    a, b = make_trainer(data, recipe), make_trainer(data, recipe)
    assert steps(a, 4) == steps(b, 4)
    assert bits(a) == bits(b)


def test_another_peer_id_draws_other_batches_and_drops(data: TokenData) -> None:
    assert steps(make_trainer(data), 1) != steps(make_trainer(data, peer_id="bob"), 1)


def test_token_drop_changes_the_loss_but_not_the_batch(data: TokenData) -> None:
    plain, dropped = make_trainer(data), make_trainer(data, make_recipe(model={"token_drop": 0.5}))
    # All layers start as no-ops, so the first loss depends on the input rows alone.
    assert steps(plain, 1) != steps(dropped, 1)
    assert plain.tokens == dropped.tokens


def test_accumulated_groups_equal_one_large_batch(data: TokenData) -> None:
    whole = make_trainer(data)
    parts = make_trainer(data, make_recipe(batch={"fragments": 1, "accumulate": 2}))
    assert steps(whole, 3) == pytest.approx(steps(parts, 3), rel=1e-5)
    assert torch.allclose(whole.weights, parts.weights, atol=1e-4)
    assert whole.tokens == parts.tokens


@pytest.mark.parametrize("told", [None, 37])
def test_ten_steps_equal_five_saved_restored_and_five_more(data: TokenData, tmp_path: Path, told: int | None) -> None:
    recipe = make_recipe(model={"token_drop": 0.2, "noise_rows": 4})
    straight, first = make_trainer(data, recipe), make_trainer(data, recipe)
    for trainer in (straight, first):
        if told is not None:
            trainer.mark_joined()
            trainer.tell_swarm_batches(told)
    losses = steps(straight, 10)
    assert steps(first, 5) == losses[:5]
    store = CheckpointStore(tmp_path, keep=1)
    store.save(first.steps, first.state_tensors(), {}, {"trainer": first.state_facts()})

    restored = make_trainer(data, recipe)
    found, _ = store.latest()
    assert found is not None
    restored.load_state(found.tensors, found.facts["trainer"])
    assert bits(restored) == bits(first) and restored.state_facts() == first.state_facts()
    assert steps(restored, 5) == losses[5:]
    assert bits(restored) == bits(straight)
    assert same_float(restored.loss_average, straight.loss_average)
    assert restored.state_facts() == straight.state_facts()


def test_a_fresh_trainer_can_be_saved(data: TokenData, tmp_path: Path) -> None:
    fresh = make_trainer(data)
    CheckpointStore(tmp_path, keep=1).save(0, fresh.state_tensors(), {}, {"trainer": fresh.state_facts()})
    found, _ = CheckpointStore(tmp_path, keep=1).latest()
    assert found is not None
    other = make_trainer(data)
    other.load_state(found.tensors, found.facts["trainer"])
    assert math.isnan(other.loss_average)
    assert steps(other, 1) == steps(fresh, 1)


def test_state_tensors_are_copies(data: TokenData) -> None:
    trainer = make_trainer(data)
    before = trainer.state_tensors()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    trainer.step()
    assert all(torch.equal(before[name], kept[name]) for name in before)


def test_a_checkpoint_of_another_model_is_refused(data: TokenData) -> None:
    other = make_trainer(data, make_recipe(model={"noise_rows": 8}))
    with pytest.raises(Refused) as caught:
        make_trainer(data).load_state(other.state_tensors(), other.state_facts())
    assert caught.value.code == "wrong-checkpoint"


def test_a_checkpoint_without_momentum_is_refused(data: TokenData) -> None:
    trainer = make_trainer(data)
    tensors = trainer.state_tensors()
    del tensors["momentum"]
    with pytest.raises(Refused, match="momentum"):
        trainer.load_state(tensors, trainer.state_facts())


def test_the_rate_follows_the_swarm(data: TokenData) -> None:
    trainer = make_trainer(data, make_recipe(optimizer={"tail": 2.0}))
    assert trainer.rate == pytest.approx(0.02 / 4)
    trainer.tell_swarm_batches(50)
    assert trainer.rate == pytest.approx(0.02)
    trainer.tell_swarm_batches(75)
    assert trainer.rate == pytest.approx(0.02 * 0.5)
    trainer.step()
    assert trainer.swarm_batches == 76
    trainer.tell_swarm_batches(BUDGET)
    assert trainer.rate == 0.0


def test_a_joiner_warms_up_by_its_own_steps(data: TokenData) -> None:
    trainer = make_trainer(data)
    trainer.tell_swarm_batches(50)
    trainer.mark_joined()
    rates = [trainer.step().rate for _ in range(6)]
    assert rates == pytest.approx([0.02 * k / 5 for k in (1, 2, 3, 4, 5, 5)])


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(data: TokenData) -> None:
    trainer = make_trainer(data)
    trainer.step()
    with torch.no_grad():
        trainer.engine.parameters.views["final"][0, 0] = math.nan
    before = bits(trainer)
    with pytest.raises(Refused) as caught:
        trainer.step()
    assert caught.value.code == "loss-not-finite" and "step 2" in caught.value.detail
    assert bits(trainer) == before
    assert not trainer.engine.parameters.flat_grad.any()


def test_momentum_is_scaled(data: TokenData) -> None:
    trainer = make_trainer(data)
    trainer.step()
    before = trainer.optimizer.momentum.clone()
    trainer.scale_momentum(1.0)
    assert torch.equal(trainer.optimizer.momentum, before)
    trainer.scale_momentum(0.25)
    assert torch.equal(trainer.optimizer.momentum, before * 0.25)


# -- donor state -----------------------------------------------------------------------------------------------------


def test_a_joiner_adopts_moments_and_step_count(data: TokenData) -> None:
    donor, joiner = make_trainer(data), make_trainer(data, peer_id="bob")
    steps(donor, 7)
    joiner.adopt(donor.donor_state())
    assert joiner.optimizer.own_steps == 7 and joiner.steps == 0
    assert torch.equal(joiner.optimizer.moment_sums, donor.optimizer.moment_sums)
    assert joiner.optimizer.moment_count == donor.optimizer.moment_count
    assert not joiner.optimizer.momentum.any()
    assert len(donor.donor_state()) <= joiner.donor_state_max_bytes()


def tampered(change: dict[str, torch.Tensor | None], data: TokenData) -> bytes:
    tensors = safetensors.torch.load(make_trainer(data).donor_state())
    tensors.update({name: tensor for name, tensor in change.items() if tensor is not None})
    return safetensors.torch.save({name: tensor for name, tensor in tensors.items() if change.get(name, tensor) is not None})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"moment_sums": None}, "not those of this model"),
        ({"moment_sums": torch.zeros(3)}, "moment_sums"),
        ({"surprise": torch.zeros(3)}, "not those of this model"),
        ({"moment_count": torch.tensor(math.nan, dtype=torch.float64)}, "not finite"),
        ({"moment_count": torch.tensor(-1.0, dtype=torch.float64)}, "negative"),
        ({"moment_count": torch.tensor(1.0)}, "moment_count"),
        ({"own_steps": None}, "own_steps"),
        ({"own_steps": torch.tensor([-1])}, "own_steps"),
        ({"own_steps": torch.tensor([10**15])}, "own_steps"),
        ({"own_steps": torch.tensor([1.0])}, "own_steps"),
        ({"own_steps": torch.tensor([1, 2])}, "own_steps"),
        ({"moment_sums": torch.zeros(10**6)}, "bytes"),
    ],
)
def test_a_strangers_donor_state_is_checked(data: TokenData, change: dict[str, torch.Tensor | None], words: str) -> None:
    joiner = make_trainer(data)
    before = bits(joiner)
    with pytest.raises(Refused) as caught:
        joiner.adopt(tampered(change, data))
    assert caught.value.code == "bad-donor-state" and words in caught.value.detail
    assert bits(joiner) == before


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 64, b"not safetensors at all"])
def test_garbage_as_donor_state_is_refused(data: TokenData, content: bytes) -> None:
    with pytest.raises(Refused) as caught:
        make_trainer(data).adopt(content)
    assert caught.value.code == "bad-donor-state"


def test_every_cut_of_a_donor_state_is_refused(data: TokenData) -> None:
    whole = make_trainer(data).donor_state()
    joiner = make_trainer(data)
    for length in range(0, len(whole), max(1, len(whole) // 50)):
        with pytest.raises(Refused):
            joiner.adopt(whole[:length])
