"""How far the engine's arithmetic is from exact arithmetic with the same quantised weights.

Enters: a precision and a seed. Leaves: differences in basis points. The case is the original's check: one layer (e384h2d1w64), one fragment
of 63 tokens, 256 token ids; weights are standard normal, so that predictions are sharp. The reference is the autograd model in fp64, whose
weights are the ones that the engine's codes stand for.

    forward   root mean square over tokens and vocabulary of the difference of the predicted probabilities, times 10,000
    step      the same after one large step: each side moves its own full weights by rate 0.1 along its own gradient, normalised per
              matrix (per row for the embedding and the final layer), without momentum; then both quantise anew
    gradient  per matrix, size of the difference over size of an fp64 gradient, times 10,000; and their cosine. Two fp64 gradients: the
              exact one, from which the engine's is far mostly since rounded states fall on the other side of a relu; and the one at the
              engine's own states (rounded_model.py), which shows what the backward pass adds
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_fed.bench.options import formats_of
from tscale_fed.bench.rounded_model import rounded_loss
from tscale_fed.engine.build import build_engine
from tscale_fed.engine.interface import StepBatch
from tscale_fed.engine.precision import Precision, choose_precision
from tscale_fed.engine.scorer import Scorer
from tscale_fed.model.forward import Model
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import ROW_NORMALISED
from tscale_kernels.dispatch import BackendName
from tscale_kernels.pack_weights import PackMatrix, PackPlan, pack_weights

DIMS, VOCAB, TOKENS, STEP_RATE = "e384h2d1w64", 256, 63, 0.1
BASIS_POINTS = 1e4


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one seed, in basis points; cosines as they are."""

    forward: float
    step: float
    gradients: dict[str, float]
    """Of every matrix, against the gradient at the engine's own states."""
    cosines: dict[str, float]
    exact_gradients: dict[str, float]
    """Against the exact gradient."""


@dataclass(frozen=True, slots=True)
class Case:
    """One fragment and start weights."""

    shape: ModelShape
    weights: Tensor
    text: Tensor
    target: Tensor


def make_case(seed: int) -> Case:
    """See the module."""
    shape = ModelShape.parse(DIMS, VOCAB)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape.trained_parameters, generator=generator)
    ids = torch.randint(VOCAB, (1, TOKENS + 1), generator=generator)
    return Case(shape, weights, ids[:, :-1].clone(), ids[:, 1:].clone())


def compare(name: str, seed: int, device: torch.device, backend: BackendName | None = None) -> Difference:
    """The engine in PRECISION/ATTENTION `name` against exact arithmetic. Raises Refused for formats that the device lacks."""
    case = make_case(seed)
    formats = formats_of(name)
    precision, _ = choose_precision(device, *formats)
    engine = build_engine(
        case.shape, case.weights, device=device, precision=formats[0], attention=formats[1], fragments=1, tokens=TOKENS, graphs=False,
        backend=backend,
    )  # fmt: skip
    scorer = Scorer(case.shape, None, precision, device, fragments=1, tokens=TOKENS, doc_start_token=None, backend=backend)
    engine.accumulate(StepBatch.make(case.shape, case.text, case.target, seed=seed))
    gradient = engine.parameters.flat_grad.cpu().double()
    exact_gradient, exact = _exact(case, case.weights, precision)
    forward = _apart(_predicted(scorer, case, case.weights), exact)
    moved, exact_moved = (_moved(case, each) for each in (gradient, exact_gradient))
    step = _apart(_predicted(scorer, case, moved), _exact(case, exact_moved, precision)[1])
    same_states = _at_same_states(case, precision)
    spans = {matrix: slice(*span) for matrix, span in Parameters(case.shape).spans.items()}
    return Difference(
        forward,
        step,
        {matrix: _relative(gradient[span], same_states[span]) for matrix, span in spans.items()},
        {matrix: _cosine(gradient[span], same_states[span]) for matrix, span in spans.items()},
        {matrix: _relative(gradient[span], exact_gradient[span]) for matrix, span in spans.items()},
    )


def quantised(shape: ModelShape, weights: Tensor, code: torch.dtype) -> Tensor:
    """fp64 [parameters]: the values that the codes of `weights` stand for; the embedding is read in fp32 and stays."""
    matrices, start = [], 0
    for name, rows, columns in shape.tensors():
        if name != "embedding":
            matrices.append(PackMatrix(start, rows, columns, transposed=False))
        start += rows * columns
    plan = PackPlan(matrices, torch.device("cpu"))
    codes, units = torch.empty(plan.elements, dtype=code), torch.zeros(plan.units)
    sums = torch.zeros(plan.blocks, dtype=torch.float64)
    pack_weights(weights.cpu(), plan, codes=codes, codes_t=torch.empty(0, dtype=code), units=units, square_sums=sums, backend="ref")
    values = weights.cpu().double().clone()
    for index, matrix in enumerate(matrices):
        packed = plan.codes_of(codes, index)[: matrix.rows].double() * plan.units_of(units, index).double()
        values[matrix.start : matrix.start + matrix.rows * matrix.columns] = packed.flatten()
    return values


def _exact(case: Case, weights: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """(gradient [parameters], probabilities [1, T, V]) in fp64."""
    parameters = Parameters(case.shape, dtype=torch.float64).load(quantised(case.shape, weights, precision.code))
    model = Model(case.shape, parameters)
    model.loss(case.text, case.target)[0].backward()
    return parameters.flat_grad, model.logits(case.text).softmax(-1)


def _at_same_states(case: Case, precision: Precision) -> Tensor:
    """Gradient [parameters] in fp64 with the engine's forward states."""
    parameters = Parameters(case.shape, dtype=torch.float64).load(quantised(case.shape, case.weights, precision.code))
    rounded_loss(case.shape, parameters.views, precision, case.text, case.target).backward()
    return parameters.flat_grad


def _relative(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm()) * BASIS_POINTS


def _cosine(ours: Tensor, wanted: Tensor) -> float:
    return float(torch.dot(ours, wanted) / (ours.norm() * wanted.norm()))


def _predicted(scorer: Scorer, case: Case, weights: Tensor) -> Tensor:
    scorer.load(weights)
    return scorer.logits(case.text).cpu().double().softmax(-1)


def _apart(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).square().mean().sqrt()) * BASIS_POINTS


def _moved(case: Case, gradient: Tensor) -> Tensor:
    """fp32 weights after one step of STEP_RATE down the normalised gradient."""
    moved, start = case.weights.double().clone(), 0
    for name, rows, columns in case.shape.tensors():
        stop = start + rows * columns
        matrix = gradient[start:stop].view(rows, columns)
        size = matrix.square().mean(dim=1 if name in ROW_NORMALISED else (0, 1), keepdim=True).sqrt()
        moved[start:stop] -= STEP_RATE * torch.where(size > 0, matrix / size, 0.0).flatten()
        start = stop
    return moved.float()
