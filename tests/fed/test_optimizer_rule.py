"""The optimizer's rule against the rule written out, its state, its hand-over to a joiner."""

import pytest
import torch
from golden_cases import State, step_by_definition

from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.kernel_step import KernelStep
from tscale_fed.optimizer.rule import ROW_NORMALISED, GradientNotFinite, Optimizer, OptimizerSettings

SHAPE = ModelShape.parse("e128h1d2w8relu2", vocab=9, noise_rows=2)


def fresh(settings: OptimizerSettings | None = None, dtype: torch.dtype = torch.float32) -> tuple[Parameters, Optimizer]:
    parameters = Parameters(SHAPE, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    parameters.load(torch.randn(SHAPE.trained_parameters, generator=generator))
    return parameters, Optimizer(parameters, settings or OptimizerSettings())


def fill_gradients(parameters: Parameters, seed: int) -> None:
    """Gradients of very different size, with zero rows and one zero matrix."""
    generator = torch.Generator().manual_seed(seed)
    for index, gradient in enumerate(parameters.grads.values()):
        gradient.copy_(torch.randn(gradient.shape, generator=generator) * 10.0 ** (index % 7 - 3))
    parameters.grads["embedding"][seed % 5] = 0.0
    parameters.grads["embedding"][8] = 0.0
    parameters.grads["layers.0.query"].zero_()


def test_steps_follow_the_definition() -> None:
    parameters, optimizer = fresh(OptimizerSettings(l2=0.3), torch.float64)
    wanted = {name: view.detach().clone() for name, view in parameters.views.items()}
    state = State()
    for t in range(6):
        fill_gradients(parameters, t)
        rate = 0.02 / (t + 1)
        for name in wanted:
            wanted[name] = step_by_definition(name, wanted[name], parameters.grads[name], state, t, rate, 0.3)
        optimizer.step(rate)
        assert not parameters.flat_grad.any()
        for name, view in parameters.views.items():
            torch.testing.assert_close(view.detach(), wanted[name], rtol=1e-12, atol=1e-12, msg=name)
    assert optimizer.own_steps == 6


def test_the_first_step_has_six_tenths_of_the_rate_in_every_matrix() -> None:
    """0.2 + 0.8 * (1 - beta), beta = 0.5, whatever the gradient's scale; a matrix without gradient stays."""
    parameters, optimizer = fresh()
    before = {name: view.detach().clone() for name, view in parameters.views.items()}
    fill_gradients(parameters, 1)
    optimizer.step(0.01)
    for name, view in parameters.views.items():
        moved = view.detach() - before[name]
        if name == "embedding":
            moved = moved[:1]  # rows 1 and 8 have no gradient
        assert float(moved.square().mean().sqrt()) == pytest.approx(0.0 if name == "layers.0.query" else 0.006, rel=1e-3), name


def test_a_step_goes_down_the_loss() -> None:
    parameters, optimizer = fresh()
    before = parameters.flat.clone()
    fill_gradients(parameters, 1)
    gradient = parameters.flat_grad.clone()
    optimizer.step(0.01)
    assert float((gradient * (parameters.flat - before)).sum()) < 0


def test_rows_without_gradient_keep_moving_by_momentum_and_their_moments_decay() -> None:
    parameters, optimizer = fresh()
    parameters.grads["embedding"].normal_(generator=torch.Generator().manual_seed(1))
    optimizer.step(0.01)
    sums, row = optimizer.moment_sums[3].item(), parameters.views["embedding"][3].detach().clone()
    beta = optimizer.beta
    optimizer.step(0.01)
    assert not torch.equal(parameters.views["embedding"][3].detach(), row)
    assert optimizer.moment_sums[3].item() == pytest.approx(sums * beta)
    assert optimizer.moment_count == pytest.approx(1 + beta)


def test_second_moments_are_one_number_per_matrix_or_row() -> None:
    _, optimizer = fresh()
    assert optimizer.moment_sums.numel() == SHAPE.embedding_rows + SHAPE.vocab + 7 * 2
    assert optimizer.momentum.shape == (SHAPE.trained_parameters,) and optimizer.momentum.dtype == torch.float32


def test_beta_grows_with_own_steps() -> None:
    _, optimizer = fresh()
    for steps, beta in [(0, 0.5), (99, 0.95), (9999, 0.995)]:
        optimizer.own_steps = steps
        assert optimizer.beta == pytest.approx(beta)


def test_a_restored_optimizer_goes_on_bit_for_bit() -> None:
    parameters, optimizer = fresh()
    for seed in range(3):
        fill_gradients(parameters, seed)
        optimizer.step(0.01)
    state, weights = optimizer.state_dict(), parameters.flat.clone()
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    other, restored = fresh()
    other.load(weights)
    restored.load_state_dict(state)
    for seed in range(3, 6):
        for p, o in ((parameters, optimizer), (other, restored)):
            fill_gradients(p, seed)
            o.step(0.01)
    assert torch.equal(parameters.flat, other.flat) and torch.equal(optimizer.momentum, restored.momentum)
    assert torch.equal(optimizer.moment_sums, restored.moment_sums) and optimizer.moment_count == restored.moment_count
    assert optimizer.own_steps == restored.own_steps == 6


def test_a_state_dict_is_a_copy() -> None:
    parameters, optimizer = fresh()
    state = optimizer.state_dict()
    fill_gradients(parameters, 1)
    optimizer.step(0.01)
    assert not state["momentum"].any() and not state["moment_sums"].any() and float(state["moment_count"]) == 0.0


def test_a_joiner_adopts_moments_and_count_but_not_momentum() -> None:
    parameters, donor = fresh()
    for seed in range(4):
        fill_gradients(parameters, seed)
        donor.step(0.01)
    _, joiner = fresh()
    joiner.adopt(donor.second_moments(), donor.own_steps)
    assert joiner.beta == donor.beta and torch.equal(joiner.moment_sums, donor.moment_sums) and not joiner.momentum.any()


def test_scaling_the_momentum() -> None:
    parameters, optimizer = fresh()
    fill_gradients(parameters, 1)
    optimizer.step(0.01)
    before = optimizer.momentum.clone()
    optimizer.scale_momentum(0.25)
    assert torch.equal(optimizer.momentum, before * 0.25)


def test_bad_states_are_refused() -> None:
    _, optimizer = fresh()
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="does not fit"):
        optimizer.load_state_dict(state | {"momentum": torch.zeros(3)})
    with pytest.raises(ValueError, match="do not fit"):
        optimizer.adopt({"moment_sums": torch.zeros(3), "moment_count": torch.tensor(1.0)}, 1)
    for sums in (torch.nan, torch.inf, -1.0):
        with pytest.raises(ValueError, match="another peer"):
            optimizer.adopt({"moment_sums": torch.full_like(optimizer.moment_sums, sums), "moment_count": torch.tensor(1.0)}, 1)
    with pytest.raises(ValueError, match="another peer"):
        optimizer.adopt(optimizer.second_moments(), -1)


@pytest.mark.parametrize(
    "changes",
    [{"rate": 0.0}, {"rate": float("nan")}, {"warmup_batches": -1}, {"join_warmup_steps": -1}, {"tail": 0.5}, {"l2": -1.0}, {"l2": 1e9}],
)
def test_bad_settings_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="optimizer"):
        OptimizerSettings(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e30])
def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing(bad: float) -> None:
    """1e30 is finite, its square is not."""
    parameters, optimizer = fresh()
    fill_gradients(parameters, 0)
    optimizer.step(0.01)
    fill_gradients(parameters, 1)
    parameters.grads["layers.1.gate"][3, 5] = bad
    before = [t.clone() for t in (parameters.flat, optimizer.momentum, optimizer.moment_sums)]
    with pytest.raises(GradientNotFinite, match=r"layers\.1\.gate"):
        optimizer.step(0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, (parameters.flat, optimizer.momentum, optimizer.moment_sums), strict=True))
    assert optimizer.own_steps == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_kernel_step_is_the_same_step(device: str) -> None:
    """On the CPU its reference runs."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    parameters, optimizer = fresh(OptimizerSettings(l2=0.3))
    kernel = KernelStep(parameters.grads, ROW_NORMALISED, torch.device(device))
    weights, momentum, sums = (t.detach().clone().to(device) for t in (parameters.flat, optimizer.momentum, optimizer.moment_sums))
    for t in range(4):
        fill_gradients(parameters, t)
        gradient = parameters.flat_grad.clone().to(device)
        beta, count = optimizer.beta, optimizer.next_count
        assert kernel.update(weights, momentum, gradient, sums, rate=0.02, beta=beta, count=count, l2=0.3) is None
        optimizer.step(0.02)
        assert not gradient.any()
        torch.testing.assert_close(weights.cpu(), parameters.flat, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(momentum.cpu(), optimizer.momentum, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sums.cpu(), optimizer.moment_sums, rtol=1e-5, atol=0)
    gradient[parameters.spans["final"][0]] = float("nan")
    before = weights.clone()
    assert kernel.update(weights, momentum, gradient, sums, rate=0.02, beta=0.5, count=1.0, l2=0.0) == "final"
    assert torch.equal(weights, before)
