"""Gradients of the hand-written passes, matrix by matrix, against autograd in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_model import cosines, rounded_loss
from model_cases import DOC_START, random_text

from tscale_fed.engine.build import build_engine
from tscale_fed.engine.engine import Engine
from tscale_fed.engine.interface import StepBatch
from tscale_fed.engine.precision import choose_precision
from tscale_fed.model.forward import Model
from tscale_fed.model.init import initialise
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape

VOCAB, NOISE_ROWS = 19, 4
FRAGMENTS, TOKENS = 3, 150

CASES = [
    ("e128h1d2w16", DOC_START),
    ("e256h2d4w30", DOC_START),
    ("e256h2d4w200relu2", None),
    ("e256h1d1w9", DOC_START),
    ("e128h2d4w64", DOC_START),
]


def trained_a_little(shape: ModelShape, seed: int) -> torch.Tensor:
    """Start weights whose zero matrices and noise rows have become 0.2 RMS."""
    flat, start = initialise(shape, seed), 0
    generator = torch.Generator().manual_seed(seed)
    for name, rows, columns in shape.tensors():
        part = flat[start : start + rows * columns]
        part.add_(0.2 * torch.randn(part.shape, generator=generator), alpha=float(name.endswith(("combiner", "ffn_down", "embedding"))))
        start += rows * columns
    return flat


def case(dims: str, seed: int) -> tuple[ModelShape, torch.Tensor, torch.Tensor, StepBatch]:
    """Shape, weights, output bias, and a batch with documents, dropped tokens and noise."""
    shape = ModelShape.parse(dims, VOCAB, NOISE_ROWS)
    text, target = random_text(FRAGMENTS, TOKENS, vocab=VOCAB, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(text.shape, generator=generator) < 0.8
    batch = StepBatch.make(shape, text, target, token_keep=keep, noise=generator, seed=seed)
    return shape, trained_a_little(shape, seed), torch.randn(VOCAB, generator=generator), batch


def engine_of(shape: ModelShape, weights: torch.Tensor, bias2: torch.Tensor, doc_start: int | None, **options: str) -> Engine:
    return build_engine(
        shape, weights, bias2, device="cpu", fragments=FRAGMENTS, tokens=TOKENS, doc_start_token=doc_start, **options,  # type: ignore[arg-type]
    )  # fmt: skip


LIMITS = [
    ("bfloat16", "bfloat16", 0.9999, 0.9995),
    ("int8", "bfloat16", 0.999, 0.997),
    ("int8", "int8", 0.999, 0.997),
    ("int8", "fp8", 0.999, 0.997),
    ("fp8", "fp8", 0.998, 0.996),
]
"""(precision, attention, least cosine of a matrix, of ffn_up)"""


def arithmetics() -> list[Any]:
    """Every model in every precision; by default one of them in all, the others as training is unless told otherwise and in fp8."""
    made = []
    for model in CASES:
        for limits in LIMITS:
            by_default = model is CASES[1] or limits[:2] in (("int8", "bfloat16"), ("fp8", "fp8"))
            name = "-".join((model[0], *limits[:2]))
            made.append(pytest.param(*model, *limits, id=name, marks=[] if by_default else pytest.mark.slow))
    return made


@pytest.mark.parametrize(("dims", "doc_start", "precision", "attention", "limit", "ffn_up_limit"), arithmetics())
def test_backward_arithmetic(dims: str, doc_start: int | None, precision: str, attention: str, limit: float, ffn_up_limit: float) -> None:
    """Equal roundings in the forward pass: what differs is the backward pass.

    A code at a rounding boundary still falls differently in fp32 than in fp64 now and then, and so does a sign before relu.
    """
    shape, weights, bias2, batch = case(dims, seed=11)
    model = Model(shape, Parameters(shape, dtype=torch.float64).load(weights), bias2)
    loss = rounded_loss(model, batch, doc_start, choose_precision(torch.device("cpu"), precision, attention)[0])
    loss.backward()
    engine = engine_of(shape, weights, bias2, doc_start, precision=precision, attention=attention)
    assert engine.accumulate(batch) == pytest.approx(float(loss.detach()), rel=1e-3)
    for name, cosine in cosines(engine.parameters.grads, model.parameter_store.grads).items():
        assert cosine > (ffn_up_limit if name.endswith("ffn_up") else limit), (name, cosine)


@pytest.mark.parametrize(
    ("precision", "limit", "ffn_up_limit"), [("bfloat16", 0.9995, 0.998), ("int8", 0.997, 0.985), ("fp8", 0.985, 0.97)]
)
@pytest.mark.parametrize("dims", ["e128h1d2w16", "e256h2d4w30"])
def test_whole_gradient(dims: str, precision: str, limit: float, ffn_up_limit: float) -> None:
    """Against the model without any rounding."""
    shape, weights, bias2, batch = case(dims, seed=12)
    model = Model(shape, Parameters(shape, dtype=torch.float64).load(weights), bias2)
    loss = model.loss_of_labels(batch.labels, batch.signs, model.plan(batch.text, DOC_START), batch.target)
    loss.backward()
    engine = engine_of(shape, weights, bias2, DOC_START, precision=precision)
    assert engine.accumulate(batch) == pytest.approx(float(loss.detach()), rel=5e-3)
    for name, cosine in cosines(engine.parameters.grads, model.parameter_store.grads).items():
        assert cosine > (ffn_up_limit if name.endswith("ffn_up") else limit), (name, cosine)


def test_size_of_the_gradient() -> None:
    """Cosines do not see a wrong factor."""
    shape, weights, bias2, batch = case("e256h2d4w30", seed=13)
    model = Model(shape, Parameters(shape, dtype=torch.float64).load(weights), bias2)
    rounded_loss(model, batch, DOC_START, choose_precision(torch.device("cpu"), "int8")[0]).backward()
    engine = engine_of(shape, weights, bias2, DOC_START, precision="int8")
    engine.accumulate(batch)
    for name, gradient in model.parameter_store.grads.items():
        assert float(engine.parameters.grads[name].norm() / gradient.norm()) == pytest.approx(1, abs=0.02), name
