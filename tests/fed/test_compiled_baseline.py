"""The compiled baseline is the same model: losses, gradients and steps equal those of the reference, here without compiling."""

from __future__ import annotations

import pytest
import torch

from tscale_fed.bench.compiled_baseline import CompiledBaseline, micro_batches_for, random_start
from tscale_fed.bench.compiled_layer import make_blocks, make_flex
from tscale_fed.model.attention import attention_ref
from tscale_fed.model.combiner import blocked_channels, blocked_columns
from tscale_fed.model.forward import Model
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import Optimizer, OptimizerSettings
from tscale_kernels.testing import assert_close

SHAPE = ModelShape.parse("e128h2d4w24", vocab=50, noise_rows=3)
FRAGMENTS, TOKENS, RATE = 4, 80, 0.02


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(50, (FRAGMENTS, TOKENS + 1), generator=torch.Generator().manual_seed(seed))
    target = text[:, 1:].clone()
    target[:, 0] = -1
    return text[:, :-1].clone(), target


def start_weights() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SHAPE.trained_parameters, generator=generator) * 0.5


def bias() -> torch.Tensor:
    return torch.randn(50, generator=torch.Generator().manual_seed(2))


def baseline(dims: ModelShape = SHAPE, micro_batches: int = 2, labels: int = 1) -> CompiledBaseline:
    return CompiledBaseline(
        dims, start_weights(), bias(), fragments=FRAGMENTS, tokens=TOKENS, device=torch.device("cpu"), compute=torch.float32,
        micro_batches=micro_batches, labels=labels, local="blocks",
    )  # fmt: skip


def test_three_steps_are_those_of_the_reference() -> None:
    ours, parameters = baseline(), Parameters(SHAPE).load(start_weights())
    model, optimizer = Model(SHAPE, parameters, bias()), Optimizer(parameters, OptimizerSettings(rate=RATE))
    for step in range(3):
        text, target = batch(step)
        total, _ = model.loss(text, target)
        total.backward()
        optimizer.step(RATE)
        assert ours.step(text, target, RATE).item() == pytest.approx(total.item(), rel=1e-5)
    text, target = batch(9)
    assert ours.losses([(text, target)]).item() == pytest.approx(model.loss(text, target)[0].item(), rel=1e-5)


def test_every_gradient_is_that_of_the_reference() -> None:
    ours, parameters = baseline(), Parameters(SHAPE).load(start_weights())
    text, target = batch(3)
    Model(SHAPE, parameters, bias()).loss(text, target)[0].backward()
    ours.step(text, target, 0.0)
    channels, columns = blocked_channels(SHAPE.heads), blocked_columns(SHAPE.heads)
    for name, gradient in parameters.grads.items():
        wanted = gradient[channels] if name.endswith(("gate", "value")) else gradient
        wanted = wanted[:, columns] if name.endswith("combiner") else wanted
        # Ours is with respect to weight / sqrt(inputs).
        got = ours.gradient_of(name)[: gradient.shape[0]] * (1.0 if name == "embedding" else gradient.shape[1] ** -0.5)
        assert_close(name, got, wanted, 1e-5)


def test_noise_rows_and_dropped_tokens_reach_the_embedding() -> None:
    ours, parameters = baseline(labels=3), Parameters(SHAPE).load(start_weights())
    text, target = batch(4)
    keep = torch.rand(text.shape, generator=torch.Generator().manual_seed(5)) < 0.8
    wanted, _ = Model(SHAPE, parameters, bias()).loss(text, target, token_keep=keep, noise=torch.Generator().manual_seed(6))
    wanted.backward()
    got = ours.step(text, target, 0.0, token_keep=keep, noise=torch.Generator().manual_seed(6))
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert_close("embedding", ours.gradient_of("embedding"), parameters.grads["embedding"], 1e-5)


def test_other_weights_can_be_evaluated_between_steps() -> None:
    ours, other = baseline(), baseline()
    batches = [batch(7), batch(8)]
    ours.step(*batches[0], RATE)
    live = ours.losses(batches)
    assert torch.allclose(ours.losses(batches, other.weights), other.losses(batches), rtol=1e-6)
    assert torch.equal(ours.losses(batches), live)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("way", [make_blocks, make_flex])
def test_local_attention_is_the_rule(way: object) -> None:
    generator = torch.Generator().manual_seed(8)
    query, key, value = (torch.randn(2, 200, 1, 128, generator=generator) for _ in range(3))
    with torch.no_grad():
        got = way(64, 0.5, 200, torch.device("cpu"))(query, key, value)  # type: ignore[operator]
    assert_close("attended", got, attention_ref(query, key, value, 64, 0.5), 1e-5)


def test_micro_batches_fit_the_card() -> None:
    big = ModelShape.parse("e1280h20d42w1024", vocab=50257)
    assert micro_batches_for(big, 24, 1024, 80e9) == 3
    assert micro_batches_for(ModelShape.parse("e256h2d36w256", vocab=257), 64, 256, 80e9) == 1


def test_random_start_follows_the_rule_of_the_model() -> None:
    flat = random_start(SHAPE, torch.device("cpu"), seed=1)
    views = Parameters(SHAPE).load(flat).views
    assert views["embedding"][:3].abs().max().item() == 0 and views["layers.1.combiner"].abs().max().item() == 0
    assert views["embedding"][3:].std().item() == pytest.approx(1.0, abs=0.05)
    assert views["layers.0.query"].std().item() == pytest.approx(0.5, abs=0.02)
