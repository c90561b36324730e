"""Parts of the model against their reference forms, in fp64: values, gradients, zeros, odd shapes."""

import math

import pytest
import torch
from model_cases import rope_by_definition

from tscale_fed.model import attention, combiner, loss, normalise, rounding
from tscale_fed.model.rotary import rotary_table, rotate


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same_with_gradients(fast: torch.Tensor, reference: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Equal values, and equal gradients of every input for one random output gradient."""
    torch.testing.assert_close(fast, reference, rtol=1e-11, atol=1e-11)
    seed = randn(*fast.shape, seed=99)
    for got, wanted in zip(torch.autograd.grad(fast, inputs, seed), torch.autograd.grad(reference, inputs, seed), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 128), (2, 3, 256), (0, 128), (1, 1, 2, 128)])
def test_normalise(shape: tuple[int, ...]) -> None:
    x = randn(*shape).requires_grad_()
    y = normalise.normalise(x)
    assert_same_with_gradients(y, normalise.normalise_ref(x), [x])
    torch.testing.assert_close(y.unflatten(-1, (-1, 128)).square().mean(-1), torch.ones(y.unflatten(-1, (-1, 128)).shape[:-1]).double())


@pytest.mark.parametrize("form", [normalise.normalise, normalise.normalise_ref])
def test_groups_of_zeros_stay_zero_and_pass_no_gradient(form: object) -> None:
    x = randn(4, 256)
    x[1, :128] = 0.0
    x[2] = 0.0
    x.requires_grad_()
    y = form(x)  # type: ignore[operator]
    y.sum().backward()
    assert x.grad is not None
    assert bool(y.isfinite().all()) and bool(x.grad.isfinite().all())
    assert not y[1, :128].any() and not y[2].any() and not x.grad[1, :128].any() and not x.grad[2].any()
    assert bool(x.grad[1, 128:].any())


def test_normalising_half_precision_is_done_in_fp32() -> None:
    x = (randn(8, 128) * 1e4).bfloat16()  # squares would overflow in half precision
    wanted = normalise.normalise_ref(x.float()).bfloat16()
    torch.testing.assert_close(normalise.normalise(x), wanted, rtol=0, atol=2**-7)
    assert normalise.normalise(x.float(), torch.bfloat16).dtype == torch.bfloat16


def test_rotary_pairs_channels_inside_blocks_of_64() -> None:
    x = randn(2, 9, 3, 128).requires_grad_()
    cosine, sine = rotary_table(9, x.device, torch.float64)
    assert_same_with_gradients(rotate(x, cosine, sine), rope_by_definition(x), [x])


def test_rotary_products_depend_on_distance_only() -> None:
    cosine, sine = rotary_table(40, torch.device("cpu"), torch.float64)
    query, key = (rotate(randn(1, 1, 1, 128, seed=s).expand(1, 40, 1, 128), cosine, sine)[0, :, 0] for s in (1, 2))
    products = query @ key.T
    for distance in (0, 1, 7, 30):
        torch.testing.assert_close(products.diagonal(-distance), products[distance, 0].expand(40 - distance))


@pytest.mark.parametrize("heads", [1, 3])
def test_pair_products_are_the_combiner_rule_in_another_order(heads: int) -> None:
    gate, attended = randn(2, 5, heads, 128, seed=1).requires_grad_(), randn(2, 5, heads, 128, seed=2).requires_grad_()
    weight = randn(7, 512 * heads, seed=3).requires_grad_()
    channels, columns = combiner.blocked_channels(heads), combiner.blocked_columns(heads)
    blocked = [x.flatten(-2)[..., channels].unflatten(-1, (heads, 128)) for x in (gate, attended)]
    fast = combiner.pair_products(*blocked) @ weight[:, columns].T
    assert_same_with_gradients(fast, combiner.combine_ref(gate, attended) @ weight.T, [gate, attended, weight])


def test_combiner_pairs_channels_by_xor() -> None:
    gate, attended = randn(1, 1, 2, 128, seed=1), randn(1, 1, 2, 128, seed=2)
    out = combiner.combine_ref(gate, attended).flatten()
    for h, r, z in [(0, 0, 0), (0, 1, 5), (1, 2, 127), (1, 3, 64)]:
        assert out[h * 512 + r * 128 + z] == gate[0, 0, h, z ^ r] * attended[0, 0, h, z]


CASES = [
    # tokens, heads, width, slope
    (1, 1, 1, 0.0),
    (1, 2, 64, 0.5),
    (2, 1, 1, 0.0),
    (33, 2, 1, 0.1),
    (33, 2, 64, 0.5),
    (65, 1, 64, 0.5),
    (70, 2, 200, 0.0),
    (63, 1, 16, 0.5),
    (64, 2, 16, 0.0),
    (67, 1, 16, 0.5),
    (9, 1, 2, 0.0),
]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "width", "slope"), CASES)
def test_attention(tokens: int, heads: int, width: int, slope: float, documents: bool) -> None:
    query, key, value = (randn(3, tokens, heads, 128, seed=s).mul(3).requires_grad_() for s in (1, 2, 3))
    text = torch.randint(6, (3, tokens), generator=torch.Generator().manual_seed(4))
    kind = (width, slope)
    plan = attention.build_plan((kind,), text, 0 if documents else None, torch.float64)
    fast = attention.attend(query, key, value, kind, plan.biases[0], plan.same_document)
    document = attention.document_numbers(text, 0) if documents else None
    assert_same_with_gradients(fast, attention.attention_ref(query, key, value, width, slope, document), [query, key, value])


def test_every_way_of_attention_is_taken_by_the_cases() -> None:
    ways = {"previous" if width == 1 else "local" if attention.is_local(tokens, width) else "full" for tokens, _, width, _ in CASES}
    assert ways == {"previous", "local", "full"}


def test_sink_has_weight_one_and_slope_is_in_powers_of_two() -> None:
    """With zero keys every logit is the slope's: weights 2^(-slope * distance) beside the sink's 1."""
    zero, value = torch.zeros(1, 4, 1, 128, dtype=torch.float64), randn(1, 4, 1, 128)
    plan = attention.build_plan(((64, 0.5),), torch.zeros(1, 4, dtype=torch.int64), None, torch.float64)
    out = attention.attend(randn(1, 4, 1, 128, seed=5), zero, value, (64, 0.5), plan.biases[0], None)
    weights = torch.tensor([2**-1.5, 2**-1.0, 2**-0.5], dtype=torch.float64)
    wanted = (weights[:, None] * value[0, :3, 0]).sum(0) / (1 + weights.sum())
    torch.testing.assert_close(out[0, 3, 0], wanted)
    assert not out[0, 0].any()


@pytest.mark.parametrize("chunk", [1, 40, 2**24])
def test_summed_loss_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk)
    state, final, bias2 = randn(2, 5, 128, seed=1).requires_grad_(), randn(13, 128, seed=2).requires_grad_(), randn(13, seed=3)
    target = torch.randint(-1, 13, (2, 5), generator=torch.Generator().manual_seed(1))
    target[0, 0] = -1
    logits = state @ final.T / math.sqrt(128) + math.log(2) * bias2
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="sum")
    assert_same_with_gradients(loss.summed_loss(state, final, bias2, target, torch.float64), wanted, [state, final])
    torch.testing.assert_close(loss.logits(state, final, bias2, torch.float64), logits)


def test_loss_without_any_target_is_zero_with_zero_gradient() -> None:
    state, final = randn(1, 3, 128).requires_grad_(), randn(5, 128).requires_grad_()
    total = loss.summed_loss(state, final, randn(5), torch.full((1, 3), -1), torch.float64)
    total.backward()
    assert float(total.detach()) == 0.0
    assert state.grad is not None and final.grad is not None and not state.grad.any() and not final.grad.any()


def test_unigram_bias() -> None:
    torch.testing.assert_close(loss.unigram_bias(torch.tensor([0, 1, 3])), torch.tensor([-1.0, math.log2(1.5), math.log2(3.5)]))


def test_rounded_weights_lie_on_the_int8_grid_and_pass_the_gradient_through() -> None:
    weight = (randn(4, 128) * 3).float().requires_grad_()
    rounded = rounding.round_weights("layers.0.query", weight)
    codes = (rounded * 32 / weight.square().mean().sqrt()).detach()
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert float(codes.min()) >= -128.001 and float(codes.max()) <= 127.001
    rounded.backward(torch.full_like(rounded, 2.0))
    assert weight.grad is not None and bool((weight.grad == 2.0).all())
    assert not rounding.round_weights("layers.0.combiner", torch.zeros(2, 128)).any()
    embedding = randn(4, 128).float()
    assert float((rounding.round_weights("embedding", embedding) - embedding).abs().max()) < 2**-9


def test_packed_gradients_have_255_steps_per_block() -> None:
    gradient = randn(3, 256).float()
    gradient[1, :128] = 0.0
    packed = rounding.pack_gradient(gradient)
    largest = gradient.unflatten(-1, (2, 128)).abs().amax(-1)
    assert bool(((packed - gradient).unflatten(-1, (2, 128)).abs() <= largest.unsqueeze(-1) / 254 * 1.0001).all())
    assert not packed[1, :128].any()
