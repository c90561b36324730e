"""Evaluation: the fixed batches give one loss for one set of weights, and training does not notice."""

from __future__ import annotations

import math

import pytest
import torch
from training_run import make_data, make_evaluator, make_recipe, make_trainer

from tscale_fed.data.token_data import TokenData


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return make_data(tmp_path_factory.mktemp("text"))


def test_the_loss_is_that_of_the_model_on_the_fixed_batches(data: TokenData) -> None:
    trainer = make_trainer(data)
    for _ in range(3):
        trainer.step()
    total, tokens = 0.0, 0
    for text, target in data.evaluation_batches(2, 16, 3, "test"):
        with torch.no_grad():
            loss, count = trainer.engine.model.loss(text, target, doc_start_token=data.doc_start_token)
        total, tokens = total + float(loss), tokens + int(count)
    measured = make_evaluator(data).loss(trainer.weights)
    assert measured.tokens == tokens == 3 * 2 * 15
    assert measured.loss == pytest.approx(total / tokens, rel=1e-6)
    assert measured.split == "test"


def test_training_does_not_notice_evaluations(data: TokenData) -> None:
    quiet, watched, evaluator = make_trainer(data), make_trainer(data), make_evaluator(data)
    other = torch.randn(watched.weights.shape)
    for _ in range(4):
        evaluator.loss(watched.weights)
        evaluator.loss(other, "train")
        assert watched.step().loss == quiet.step().loss
    assert torch.equal(watched.weights, quiet.weights)
    assert torch.equal(watched.optimizer.momentum, quiet.optimizer.momentum)


def test_one_loss_for_one_set_of_weights(data: TokenData) -> None:
    trainer, evaluator = make_trainer(data), make_evaluator(data)
    at_start = trainer.weights.clone()
    first = evaluator.loss(at_start)
    for _ in range(20):
        trainer.step()
    assert evaluator.loss(trainer.weights).loss < first.loss
    assert evaluator.loss(at_start).loss == first.loss == make_evaluator(data).loss(at_start).loss


def test_weights_are_only_read(data: TokenData) -> None:
    weights = make_trainer(data).weights.clone()
    before = weights.clone()
    make_evaluator(data).loss(weights)
    assert torch.equal(weights, before)


def test_the_two_parts_are_different_text(data: TokenData) -> None:
    weights, evaluator = make_trainer(data).weights, make_evaluator(data)
    assert evaluator.loss(weights, "train").loss != evaluator.loss(weights, "test").loss


def test_bits_per_byte_of_a_byte_tokenizer_are_bits_per_token(data: TokenData) -> None:
    measured = make_evaluator(data).loss(make_trainer(data).weights)
    assert measured.bits_per_byte == pytest.approx(measured.loss / math.log(2), rel=0.02)  # document starts are tokens without bytes


def test_no_token_drop_and_no_noise(data: TokenData) -> None:
    noisy = make_recipe(model={"token_drop": 0.5, "noise_rows": 4})
    trainer, evaluator = make_trainer(data, noisy), make_evaluator(data, noisy)
    assert evaluator.loss(trainer.weights).loss == evaluator.loss(trainer.weights).loss


def test_weights_of_another_model_are_refused(data: TokenData) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        make_evaluator(data).loss(torch.zeros(5))
