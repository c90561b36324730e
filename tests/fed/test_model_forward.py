"""The whole model: equal to the rules written out, causal, silent across documents, with true gradients."""

import pytest
import torch
from model_cases import DOC_START, logits_by_definition, loss_by_definition, random_model, random_text

from tscale_fed.model.forward import Model
from tscale_fed.model.init import initialise
from tscale_fed.model.labels import draw_token_keep, input_labels
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.rounding import round_weights
from tscale_fed.model.shape import ModelShape

DIMS = ["e128h1d4w16", "e256h2d4relu2w200", "e128h3d6relu3w32", "e128d1w8"]


@pytest.mark.parametrize("doc_start", [None, DOC_START])
@pytest.mark.parametrize("tokens", [1, 67, 130])
@pytest.mark.parametrize("dims", DIMS)
def test_logits_and_gradients_follow_the_definition(dims: str, tokens: int, doc_start: int | None) -> None:
    model = random_model(dims, dtype=torch.float64)
    text, target = random_text(2, tokens)
    labels, signs = input_labels(model.shape, text)
    wanted = logits_by_definition(model, labels, signs, text, doc_start)
    torch.testing.assert_close(model.logits(text, doc_start_token=doc_start), wanted.detach(), rtol=1e-9, atol=1e-9)
    total, count = model.loss(text, target, doc_start_token=doc_start)
    assert int(count) == 2 * (tokens - 1)
    total.backward()
    fast = model.parameter_store.flat_grad.clone()
    model.parameter_store.zero_grad()
    loss_by_definition(model, text, target, doc_start).backward()
    torch.testing.assert_close(fast, model.parameter_store.flat_grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dims", DIMS)
def test_gradients_are_the_slopes_of_the_loss(dims: str) -> None:
    """Finite differences along a random direction of every matrix, with token drop and noise."""
    model = random_model(dims, dtype=torch.float64)
    text, target = random_text(2, 37)

    def loss() -> torch.Tensor:
        noise = torch.Generator().manual_seed(5)
        keep = draw_token_keep(text, 0.8, noise)
        return model.loss(text, target, doc_start_token=DOC_START, token_keep=keep, noise=noise)[0]

    loss().backward()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.parameter_store.views.items():
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        with torch.no_grad():
            start = weight.clone()
            up = float(loss_at(weight, start + step * direction, loss))
            down = float(loss_at(weight, start - step * direction, loss))
            weight.copy_(start)
        slope = float((model.parameter_store.grads[name] * direction).sum())
        assert (up - down) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-6), name


def loss_at(weight: torch.Tensor, value: torch.Tensor, loss: object) -> torch.Tensor:
    weight.copy_(value)
    return loss()  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize("dims", DIMS)
def test_no_token_sees_the_future(dims: str) -> None:
    model = random_model(dims)
    text, _ = random_text(1, 80)
    before = model.logits(text)
    for changed in (1, 40, 79):
        other = text.clone()
        other[0, changed] = (text[0, changed] + 1) % 19
        after = model.logits(other)
        torch.testing.assert_close(after[0, :changed], before[0, :changed], rtol=0, atol=1e-5)
        assert float((after[0, changed] - before[0, changed]).abs().max()) > 1e-3


def test_fragments_do_not_see_each_other_and_positions_start_anew() -> None:
    model = random_model("e128h2d4w32")
    text, _ = random_text(3, 50)
    torch.testing.assert_close(model.logits(text)[1], model.logits(text[1:2])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", DIMS)
def test_a_document_does_not_see_what_was_before_it(dims: str) -> None:
    model = random_model(dims)
    text = random_text(1, 70)[0].clamp_min(DOC_START + 1)
    text[0, 30] = DOC_START
    other = text.clone()
    other[0, :30] = (text[0, :30] - 3) % 15 + 4
    together, apart = (model.logits(t, doc_start_token=DOC_START) for t in (text, other))
    torch.testing.assert_close(together[0, 30:], apart[0, 30:], rtol=0, atol=1e-5)
    if dims != "e128d1w8":  # the wide layers of the others reach across when documents are not told apart
        assert float((model.logits(text)[0, 31:] - model.logits(other)[0, 31:]).abs().max()) > 1e-3
    # A document's start sees nothing, like the first token of a fragment: moved to the front, the document reads the same.
    torch.testing.assert_close(model.logits(text[:, 30:], doc_start_token=DOC_START)[0], together[0, 30:], rtol=1e-4, atol=1e-4)


def test_a_new_model_predicts_unigrams_and_has_finite_gradients() -> None:
    """Combiner and feed-forward down start at zero, noise rows are zero groups: no NaN may come of either."""
    shape = ModelShape.parse("e128h2d4w16", vocab=19, noise_rows=4)
    model = Model(shape, Parameters(shape).load(initialise(shape, seed=1)))
    text, target = random_text(2, 20)
    model.loss(text, target, noise=torch.Generator().manual_seed(1))[0].backward()
    grads = model.parameter_store.grads
    assert bool(model.parameter_store.flat_grad.isfinite().all())
    assert bool(grads["layers.0.combiner"].any()) and bool(grads["embedding"][:4].any())
    assert not grads["layers.0.query"].any()


def test_a_zero_embedding_gives_a_zero_state_without_nan() -> None:
    model = random_model("e128h1d4w16")
    with torch.no_grad():
        model.embedding.zero_()
    text, target = random_text(1, 12)
    total, _ = model.loss(text, target)
    total.backward()
    assert bool(total.isfinite()) and bool(model.parameter_store.flat_grad.isfinite().all())


def test_start_weights_by_seed() -> None:
    shape = ModelShape.parse("e128h1d4w16", vocab=300, noise_rows=32)
    flat = initialise(shape, seed=3)
    assert torch.equal(flat, initialise(shape, seed=3)) and not torch.equal(flat, initialise(shape, seed=4))
    views = Parameters(shape).load(flat).views
    assert not views["embedding"][:32].any()
    assert float(views["embedding"][32:].detach().std()) == pytest.approx(1.0, rel=0.02)
    for name in ("final", "layers.1.query", "layers.2.key", "layers.3.gate", "layers.0.value", "layers.0.ffn_up"):
        assert float(views[name].detach().std()) == pytest.approx(0.5, rel=0.03), name
    assert not views["layers.0.combiner"].any() and not views["layers.3.ffn_down"].any()


def test_token_drop_and_noise_rows_choose_the_embedding_rows() -> None:
    shape = ModelShape.parse("e128", vocab=10, noise_rows=4)
    text = torch.tensor([[0, 9, 5]])
    labels, signs = input_labels(shape, text, torch.tensor([[True, False, True]]))
    assert labels.tolist() == [[[5], [4], [10]]] and signs.tolist() == [1.0]
    labels, signs = input_labels(shape, text, None, torch.Generator().manual_seed(0))
    assert signs.tolist() == [1.0, 1.0, -1.0]
    assert labels[..., 0].tolist() == [[5, 14, 10]] and int(labels[..., 1:].max()) < 4
    again, _ = input_labels(shape, text, None, torch.Generator().manual_seed(0))
    assert torch.equal(labels, again)
    without = ModelShape.parse("e128", vocab=10)
    assert input_labels(without, text, None, torch.Generator())[0].tolist() == [[[1], [10], [6]]]


def test_token_drop_keeps_the_stated_fraction() -> None:
    keep = draw_token_keep(torch.zeros(100, 100), 0.9, torch.Generator().manual_seed(0))
    assert float(keep.float().mean()) == pytest.approx(0.9, abs=0.01)


def test_gradients_add_up_over_micro_batches() -> None:
    model = random_model("e128h1d4w16", dtype=torch.float64)
    text, target = random_text(4, 20)
    model.loss(text, target)[0].backward()
    whole = model.parameter_store.flat_grad.clone()
    model.parameter_store.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        model.loss(text[half], target[half])[0].backward()
    torch.testing.assert_close(model.parameter_store.flat_grad, whole)
    assert model.parameter_store.views["final"].grad is not None
    assert model.parameter_store.views["final"].grad.data_ptr() == model.parameter_store.grads["final"].data_ptr()


def test_flat_buffer_and_views_are_the_same_memory() -> None:
    model = random_model("e128h1d4w16")
    parameters = model.parameter_store
    assert {name for name, _ in model.named_parameters()} == set(parameters.views)
    parameters.flat.fill_(2.0)
    assert all(bool((view == 2.0).all()) for view in parameters.views.values())
    with pytest.raises(ValueError, match="do not fit"):
        parameters.load(torch.zeros(5))
    with pytest.raises(TypeError, match="Parameters"):
        model.double()
    with pytest.raises(ValueError, match="vocabulary"):
        Model(model.shape, parameters, torch.zeros(3))


def test_low_precision_products_stay_close() -> None:
    model = random_model("e128h2d4w16")
    text, target = random_text(2, 70)
    fast = Model(model.shape, model.parameter_store, model.bias2, compute_dtype=torch.bfloat16)
    wanted, got = model.logits(text).softmax(-1), fast.logits(text).softmax(-1)
    assert float((wanted - got).abs().max()) < 0.05
    model.loss(text, target)[0].backward()
    gradient = model.parameter_store.flat_grad.clone()
    model.parameter_store.zero_grad()
    fast.loss(text, target)[0].backward()
    assert float((gradient - model.parameter_store.flat_grad).norm() / gradient.norm()) < 0.05


def test_rounded_weights_change_predictions_but_not_the_weights() -> None:
    model = random_model("e128h1d4w16")
    text, _ = random_text(1, 20)
    before = model.parameter_store.flat.clone()
    assert not torch.equal(model.logits(text), model.logits(text, weight_rounding=round_weights))
    assert torch.equal(before, model.parameter_store.flat)


@pytest.mark.slow
def test_a_layer_compiles_as_one_graph() -> None:
    """`fullgraph` refuses any branch on data; the tracing backend needs no compiler on the machine."""
    model = random_model("e128h1d4w16", dtype=torch.float64)
    text, target = random_text(2, 70)
    model.loss(text, target, doc_start_token=DOC_START)[0].backward()
    wanted = model.parameter_store.flat_grad.clone()
    model.parameter_store.zero_grad()
    model.compile(fullgraph=True, backend="aot_eager")
    model.loss(text, target, doc_start_token=DOC_START)[0].backward()
    torch.testing.assert_close(model.parameter_store.flat_grad, wanted, rtol=1e-8, atol=1e-9)
