"""Packing, embedding, head and optimizer step against the model, by their references; plans and what they refuse."""

import math

import pytest
import torch

from tscale_fed.model.labels import embed
from tscale_fed.model.loss import summed_loss
from tscale_fed.model.normalise import normalise_ref
from tscale_fed.model.rounding import round_weights
from tscale_kernels import codes, embedding, head
from tscale_kernels.flat_blocks import Span, block_table, ref_block_squares
from tscale_kernels.optimizer_step import ALL_FINITE, UpdateMatrix, UpdatePlan, optimizer_step, step_scalars
from tscale_kernels.pack_weights import PackMatrix, PackPlan, pack_weights
from tscale_kernels.testing import assert_close, assert_same_bits, poisoned

CODES = [torch.int8, torch.float8_e4m3fn, torch.bfloat16]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(flat: torch.Tensor, plan: PackPlan, code: torch.dtype) -> dict[str, torch.Tensor]:
    sizes = {"codes": (plan.elements, code), "codes_t": (plan.transposed_elements, code), "units": (plan.units, torch.float32)}
    out = {name: poisoned((count,), dtype) for name, (count, dtype) in sizes.items()}
    out["square_sums"] = poisoned((plan.blocks,), torch.float64)
    pack_weights(flat, plan, **out)
    return out


# -- packing -----------------------------------------------------------------------------------------------------------


def test_int8_codes_are_the_rounded_weights_of_the_model() -> None:
    weights = numbers(200, 256) * 0.3
    plan = PackPlan([PackMatrix(0, 200, 256)], "cpu")
    out = packed(weights.flatten(), plan, torch.int8)
    value = plan.codes_of(out["codes"], 0).float() * plan.units_of(out["units"], 0)
    assert_close("value", value[:200], round_weights("final", weights), 1e-4)
    assert int(plan.codes_of(out["codes"], 0)[200:].abs().max()) == 0


@pytest.mark.parametrize("code", CODES, ids=str)
def test_maps_segments_and_transposed_copies(code: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.cat([128 * i + torch.randperm(128, generator=generator) for i in range(4)])
    columns = torch.randperm(256, generator=generator)
    weights = numbers(512, 256) * torch.tensor([1.0, 10.0, 0.0, 0.1]).repeat_interleave(128)[:, None]
    plan = PackPlan([PackMatrix(256, 512, 256, row_map=rows, column_map=columns, segments=4)], "cpu")
    out = packed(torch.cat((numbers(256), weights.flatten())), plan, code)
    kernel_order = plan.codes_of(out["codes"], 0)
    value = kernel_order.float() * out["units"].repeat_interleave(128)[:, None]
    assert_close("value", value, weights[rows][:, columns], {torch.int8: 0.011, torch.float8_e4m3fn: 0.03, torch.bfloat16: 0.003}[code])
    assert_same_bits("transposed", plan.transposed_of(out["codes_t"], 0), kernel_order.T.contiguous())
    want = weights.view(4, -1).double().square().mean(1).sqrt() / codes.weight_scale(code)
    assert_close("units", out["units"].double(), want, 1e-6)


def test_sums_that_the_optimizer_leaves_are_those_of_packing() -> None:
    shapes = [(9, 128), (256, 256), (128, 384)]
    starts = [0, 9 * 128, 9 * 128 + 256 * 256]
    flat, zeros = numbers(starts[2] + 128 * 384), torch.zeros(starts[2] + 128 * 384)
    update = UpdatePlan([UpdateMatrix(start, *shape, per_row=start == 0) for start, shape in zip(starts, shapes, strict=True)], "cpu")
    left = poisoned((update.blocks,), torch.float64)
    optimizer_step(
        flat, zeros.clone(), numbers(flat.numel(), seed=1), update, scalars=torch.tensor(step_scalars(0.01, 0.5, 1.0)),
        moment_sums=torch.zeros(update.moments), bad_matrix=torch.full((1,), ALL_FINITE, dtype=torch.int32), weight_squares=left,
    )  # fmt: skip
    plan = PackPlan([PackMatrix(starts[i], *shapes[i]) for i in (1, 2)], "cpu")
    assert_same_bits("sums", left[update.blocks - plan.blocks :], packed(flat, plan, torch.int8)["square_sums"])


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="tiles of 128"):
        PackPlan([PackMatrix(0, 128, 100)], "cpu")
    with pytest.raises(ValueError, match="2 segments"):
        PackPlan([PackMatrix(0, 192, 128, segments=2)], "cpu")
    with pytest.raises(ValueError, match="too large"):
        PackPlan([PackMatrix(0, 2**24, 128)], "cpu")
    plan = PackPlan([PackMatrix(0, 128, 128, transposed=False)], "cpu")
    with pytest.raises(ValueError, match="without transposed"):
        plan.transposed_of(torch.empty(0, dtype=torch.int8), 0)
    with pytest.raises(ValueError, match="the plan"):
        pack_weights(numbers(128 * 128), plan, codes=torch.empty(5, dtype=torch.int8), codes_t=torch.empty(0, dtype=torch.int8),
                     units=torch.empty(1), square_sums=torch.empty(4, dtype=torch.float64))  # fmt: skip


def test_blocks_cover_every_element_once() -> None:
    spans = [Span(128, 128 * 70), Span(128 * 80, 128), Span(128 * 90, 128 * 32)]
    seen = torch.zeros(128 * 130, dtype=torch.int64)
    for start, groups, _ in block_table(spans).tolist():
        seen[start : start + 128 * groups] += 1
    assert int(seen.max()) == 1 and int(seen.sum()) == sum(span.elements for span in spans)
    flat = numbers(128 * 130)
    sums = ref_block_squares(flat, spans)
    assert sums.numel() == sum(span.blocks for span in spans)
    assert math.isclose(float(sums.sum()), float(flat.double()[seen == 1].square().sum()), rel_tol=1e-6)
    with pytest.raises(ValueError, match="groups of 128"):
        block_table([Span(64, 128)])


# -- embedding ---------------------------------------------------------------------------------------------------------


def test_embedding_is_the_models_start_state() -> None:
    generator = torch.Generator().manual_seed(2)
    table, signs = numbers(40, 256), torch.tensor([1.0, 1.0, -1.0])
    labels = torch.randint(0, 40, (128, 3), generator=generator)
    state, n, rms = poisoned((128, 256), torch.float32), poisoned((128, 256), torch.int8), poisoned((2, 128), torch.float32)
    embedding.embed_normalise(labels, signs, table, x=state, n=n, rms=rms)
    want = embed(table, labels[None], signs)[0]
    assert_close("state", state, want, 1e-6)
    assert_close("codes", n.float() / 24, normalise_ref(want), 0.013)
    dx = numbers(128, 256, seed=3)
    leaf = table.clone().requires_grad_()
    embed(leaf, labels[None], signs)[0].backward(dx)
    grad = torch.ones(40, 256)
    embedding.embedding_gradient(dx, labels, signs, grad=grad)
    assert leaf.grad is not None
    assert_close("gradient", grad - 1, leaf.grad, 1e-6)


def test_positions_without_a_label_are_zero_and_give_no_gradient() -> None:
    labels = torch.full((128, 1), -1)
    x, n, rms = poisoned((128, 128), torch.float32), poisoned((128, 128), torch.int8), poisoned((1, 128), torch.float32)
    embedding.embed_normalise(labels, torch.ones(1), numbers(3, 128), x=x, n=n, rms=rms)
    assert not x.any() and not n.any() and not rms.any()
    grad = torch.zeros(3, 128)
    embedding.embedding_gradient(numbers(128, 128), labels, torch.ones(1), grad=grad)
    assert not grad.any()
    with pytest.raises(ValueError, match="do not match"):
        embedding.embedding_gradient(numbers(128, 256), labels, torch.ones(1), grad=grad)


# -- head --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES, ids=str)
def test_head_is_the_models_loss(code: torch.dtype) -> None:
    vocab, generator = 150, torch.Generator().manual_seed(4)
    n = codes.encode(numbers(256, 256) * codes.vector_scale(code), code)
    weights = numbers(256, 256, seed=5) * codes.weight_scale(code)
    weights[vocab:] = 0
    w, unit = codes.encode(weights, code), torch.tensor([0.5 / codes.weight_scale(code)])
    bias2 = numbers(vocab, seed=6)
    bias = torch.full((256,), head.PADDING_BIAS)
    bias[:vocab] = bias2 * math.log(2)
    target = torch.randint(0, vocab, (256,), generator=generator)
    target[::7] = head.NO_TARGET

    state = (n.double() / codes.vector_scale(code)).requires_grad_()
    final = (w[:vocab].double() * unit.double()).requires_grad_()
    want = summed_loss(state[None], final, bias2.double(), target[None], torch.float64)
    want.backward()
    losses, loss_sum = poisoned((256,), torch.float32), torch.ones(1, dtype=torch.float64)
    d_n, grad = poisoned((256, 256), torch.bfloat16), torch.zeros(vocab, 256)
    head.loss_and_gradient(n, w, unit, bias, target, losses=losses, loss_sum=loss_sum, d_n=d_n, grad=grad)
    assert float(loss_sum) - 1 == pytest.approx(float(want.detach()), rel=1e-6)
    assert state.grad is not None and final.grad is not None
    assert_close("d_n", d_n.double(), state.grad, 4e-3)
    assert_close("grad", grad.double(), final.grad, 3e-3)
    assert not losses[::7].any()
    alone = torch.zeros(1, dtype=torch.float64)
    head.loss(n, w, unit, bias, target, losses=poisoned((256,), torch.float32), loss_sum=alone)
    assert float(alone) == float(loss_sum) - 1


def test_a_final_layer_of_zeros_has_a_gradient() -> None:
    n, w = torch.ones(128, 128, dtype=torch.int8), torch.zeros(128, 128, dtype=torch.int8)
    grad, d_n = torch.zeros(128, 128), poisoned((128, 128), torch.bfloat16)
    head.loss_and_gradient(
        n, w, torch.zeros(1), torch.zeros(128), torch.zeros(128, dtype=torch.int64), losses=poisoned((128,), torch.float32),
        loss_sum=torch.zeros(1, dtype=torch.float64), d_n=d_n, grad=grad,
    )  # fmt: skip
    assert not d_n.any() and bool(grad.isfinite().all()) and bool(grad.any())


@pytest.mark.parametrize(("rows", "vocab", "width"), [(24576, 50304, 1280), (16384, 384, 256), (128, 128, 128), (1 << 17, 128256, 4096)])
def test_head_scratch(rows: int, vocab: int, width: int) -> None:
    chunk, parts = head.chunk_rows(rows, vocab), head.gradient_splits(rows, vocab, width)
    assert chunk % 128 == 0 and chunk * -(-rows // chunk) - rows < chunk and 2 * chunk * vocab <= head.CHUNK_BYTES
    assert parts * vocab * width * 4 < 2**26 and parts * (vocab // 128) * (width // 128) < 1000
    shapes = head.scratch_shapes(rows, vocab, width)
    assert head.scratch_bytes(rows, vocab, width) == sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
    assert head.scratch_bytes(rows, vocab, width, gradient=False) < head.scratch_bytes(rows, vocab, width)


# -- optimizer ---------------------------------------------------------------------------------------------------------


def test_a_bf16_momentum_does_not_lose_small_steps() -> None:
    """400 steps that are each a tenth of the spacing: rounding to nearest would stay where it is."""
    plan = UpdatePlan([UpdateMatrix(0, 128, 128)], "cpu")
    momentum, bad = torch.ones(128 * 128, dtype=torch.bfloat16), torch.full((1,), ALL_FINITE, dtype=torch.int32)
    for step in range(400):
        optimizer_step(
            torch.zeros(128 * 128), momentum, torch.zeros(128 * 128), plan, scalars=torch.tensor(step_scalars(0.0, 0.9995, 1.0)),
            moment_sums=torch.zeros(1), bad_matrix=bad, seed=torch.tensor([step], dtype=torch.int32),
        )  # fmt: skip
    assert float(momentum.double().mean()) == pytest.approx(0.9995**400, abs=2e-3)


def test_a_step_that_was_bad_before_is_not_taken() -> None:
    plan = UpdatePlan([UpdateMatrix(0, 128, 128)], "cpu")
    weights, bad = numbers(128 * 128), torch.full((1,), -1, dtype=torch.int32)
    before = weights.clone()
    optimizer_step(weights, torch.zeros_like(weights), numbers(128 * 128, seed=1), plan, scalars=torch.tensor(step_scalars(0.1, 0.5, 1.0)),
                   moment_sums=torch.zeros(1), bad_matrix=bad)  # fmt: skip
    assert torch.equal(weights, before) and int(bad) == -1


def test_what_cannot_be_updated_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        UpdatePlan([UpdateMatrix(0, 4, 100)], "cpu")
    with pytest.raises(ValueError, match="of no use"):
        UpdatePlan([UpdateMatrix(0, 4, 128, per_row=True, sums=(0, 1))], "cpu")
    plan = UpdatePlan([UpdateMatrix(0, 4, 128, sums=(0, 1))], "cpu")
    flat, moments, bad = torch.zeros(512), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    scalars = torch.tensor(step_scalars(0.1, 0.5, 1.0))
    with pytest.raises(ValueError, match="square sums"):
        optimizer_step(flat, flat, flat, plan, scalars=scalars, moment_sums=moments, bad_matrix=bad)
    with pytest.raises(ValueError, match="seed"):
        optimizer_step(flat, flat.bfloat16(), flat, plan, scalars=scalars, moment_sums=moments, bad_matrix=bad)
    with pytest.raises(ValueError, match="do not fit"):
        optimizer_step(flat[:256], flat[:256], flat[:256], plan, scalars=scalars, moment_sums=moments, bad_matrix=bad)
