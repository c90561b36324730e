"""Conformance: enters a golden file, leaves how far this implementation is from the one that printed it, and a verdict.

What is compared, with weights rounded as the original stores them (`model.rounding`):
- predictions of the start weights at every position with a target: largest absolute difference
- the update of every matrix over all steps: |ours - theirs| / |theirs - start|, root mean square over the matrix. It is judged with the
  original's gradient packing emulated. Without packing it is shown for information: what is left there is the packing's own rounding.
Several steps: the original's reference applies the embedding's update late when steps run back to back, and its forward pass keeps
reading the old rows. How late depends on how it was driven, so each way is tried, the nearest is judged, and the embedding itself is only
reported.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tscale_fed.golden import Golden
from tscale_fed.model.forward import Model
from tscale_fed.model.loss import NO_TARGET
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.rounding import pack_gradient, round_weights
from tscale_fed.optimizer.rule import Optimizer
from tscale_fed.optimizer.schedule import rate

PREDICTION_LIMIT = 2e-5
"""Largest difference of a probability. One weight rounded the other way at a tie gives about 8e-6; another formula gives 1e-3."""
ONE_STEP_LIMIT = 2e-3
"""Relative update error with packing: correct implementations show 2e-4 to 1.1e-3."""
SEVERAL_STEPS_LIMIT = 2e-2
"""Likewise after several steps: weights near a rounding tie fall differently and later gradients follow them."""
UNPACKED_HINT = 1e-2
"""What a correct implementation shows after one step without packing; printed, not judged."""

EMBEDDING = "embedding"
EMBEDDING_DELAYS = {"at once": 0, "one step late": 1, "after the last step": None}
"""Steps by which the forward pass sees embedding updates late; None = never during the run."""


@dataclass(frozen=True)
class MatrixError:
    """Relative update error of one matrix, with and without gradient packing; `limit` None = reported only."""

    name: str
    packed: float
    unpacked: float
    limit: float | None

    @property
    def passed(self) -> bool:
        return self.limit is None or self.packed <= self.limit


@dataclass(frozen=True)
class Conformance:
    """The outcome. `embedding_seen` says which delay of the embedding was nearest (one of EMBEDDING_DELAYS)."""

    golden: Golden
    prediction_error: float
    matrices: tuple[MatrixError, ...]
    embedding_seen: str

    @property
    def passed(self) -> bool:
        return self.prediction_error <= PREDICTION_LIMIT and all(matrix.passed for matrix in self.matrices)


def check(golden: Golden) -> Conformance:
    """Run the golden file's model on the CPU and compare."""
    delays = EMBEDDING_DELAYS if golden.steps > 1 else {"at once": 0}
    tried = {name: _update_errors(golden, delay, packed=True) for name, delay in delays.items()}
    nearest = min(tried, key=lambda name: max(error for matrix, error in tried[name].items() if matrix != EMBEDDING))
    unpacked = _update_errors(golden, delays[nearest], packed=False)
    limit = SEVERAL_STEPS_LIMIT if golden.steps > 1 else ONE_STEP_LIMIT
    matrices = tuple(
        MatrixError(name, error, unpacked[name], None if golden.steps > 1 and name == EMBEDDING else limit)
        for name, error in tried[nearest].items()
    )
    return Conformance(golden, prediction_error(golden), matrices, nearest)


def prediction_error(golden: Golden) -> float:
    """Largest absolute difference of a predicted probability where there is a target; NaN where either side has one."""
    model = _model(golden)
    worst = 0.0
    for text, target, predicted in zip(golden.text, golden.target, golden.predicted, strict=False):  # pred may cover the first batch only
        logits = model.logits(text, doc_start_token=golden.doc_start_token, weight_rounding=round_weights)
        difference = (logits.softmax(-1) - predicted).abs()[target != NO_TARGET]
        if difference.numel():
            worst = max(worst, float(difference.max()))
        if bool(difference.isnan().any()):
            return float("nan")
    return worst


def _model(golden: Golden) -> Model:
    return Model(golden.shape, Parameters(golden.shape).load_matrices(golden.init), golden.bias2)


def _update_errors(golden: Golden, embedding_delay: int | None, *, packed: bool) -> dict[str, float]:
    """Relative update error of every matrix after all steps."""
    model = _model(golden)
    parameters = model.parameter_store
    optimizer = Optimizer(parameters, golden.settings)
    embedding = parameters.views[EMBEDDING]
    versions = [embedding.detach().clone()]
    for step in range(golden.steps):
        with torch.no_grad():
            embedding.copy_(versions[0] if embedding_delay is None else versions[max(0, step - embedding_delay)])
        plan = model.plan(golden.text[step], golden.doc_start_token)
        model.loss_of_labels(golden.labels[step], golden.signs[step], plan, golden.target[step], round_weights).backward()
        if packed:
            for gradient in parameters.grads.values():
                gradient.copy_(pack_gradient(gradient))
        with torch.no_grad():
            embedding.copy_(versions[-1])
        optimizer.step(rate(golden.settings, step, golden.budget_batches))
        versions.append(embedding.detach().clone())
    return {name: _relative_error(view.detach(), golden.after[name], golden.init[name]) for name, view in parameters.views.items()}


def _relative_error(ours: torch.Tensor, theirs: torch.Tensor, start: torch.Tensor) -> float:
    """|ours - theirs| / |theirs - start| in fp64; a matrix that must not move has error 0 or infinity."""
    error = float((ours.double() - theirs.double()).norm())
    update = float((theirs.double() - start.double()).norm())
    if update == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / update


def report_lines(outcome: Conformance) -> Iterator[str]:
    """The table and the verdict, as text for people."""
    golden = outcome.golden
    steps = f"{golden.steps} step{'s' if golden.steps > 1 else ''}"
    yield f"model {golden.shape.dims}, vocabulary {golden.shape.vocab}, {golden.text.shape[1]} x {golden.text.shape[2]} tokens, {steps}"
    verdict = _word(_prediction_passed(outcome))
    yield f"predictions   largest difference {outcome.prediction_error:.1e} (limit {PREDICTION_LIMIT:.0e})  {verdict}"
    if golden.steps > 1:
        yield f"embedding     its updates are seen {outcome.embedding_seen} (the nearest to the file; the original applies them late)"
    width = max(len(matrix.name) for matrix in outcome.matrices)
    yield f"{'update of':<{width}}  error packed  unpacked  limit"
    for matrix in outcome.matrices:
        limit = f"{matrix.limit:.0e}" if matrix.limit is not None else "none"
        verdict = _word(matrix.passed) if matrix.limit is not None else "reported only"
        yield f"{matrix.name:<{width}}  {matrix.packed:12.1e}  {matrix.unpacked:8.1e}  {limit}  {verdict}"
    judged = [matrix for matrix in outcome.matrices if matrix.limit is not None]
    worst = max(judged, key=lambda matrix: matrix.packed if matrix.packed == matrix.packed else float("inf"))
    unpacked = max(matrix.unpacked for matrix in judged)
    usual = f", usual is up to {UNPACKED_HINT:.0e}" if golden.steps == 1 else ""
    yield f"largest update error {worst.packed:.1e} in {worst.name} (without packing {unpacked:.1e}{usual})"
    if outcome.passed:
        yield "conforms"
    else:
        failed = [] if _prediction_passed(outcome) else ["predictions"]
        failed += [matrix.name for matrix in outcome.matrices if not matrix.passed]
        yield f"does NOT conform: {', '.join(failed)} over the limit"


def _prediction_passed(outcome: Conformance) -> bool:
    return outcome.prediction_error <= PREDICTION_LIMIT


def _word(passed: bool) -> str:
    return "ok" if passed else "FAIL"
