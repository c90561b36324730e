"""The precision bench: its references are the model, its differences are zero where nothing is rounded, limits are judged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tscale_fed.bench.precision import ROWS, excesses, table_lines
from tscale_fed.bench.precision_cases import Difference, compare, make_case, quantised
from tscale_fed.bench.rounded_model import rounded_loss
from tscale_fed.cli import main
from tscale_fed.engine.precision import Precision
from tscale_fed.model.forward import Model
from tscale_fed.model.parameters import Parameters
from tscale_kernels.testing import assert_close, relative_error

CPU = torch.device("cpu")


def test_quantised_weights_lie_on_steps_of_the_matrix_and_are_near() -> None:
    case = make_case(1)
    values = quantised(case.shape, case.weights, torch.int8)
    start, stop = Parameters(case.shape).spans["layers.0.ffn_up"]
    matrix = case.weights[start:stop]
    steps = values[start:stop] / (matrix.double().square().mean().sqrt() / 32)
    assert (steps - steps.round()).abs().max() < 1e-4
    assert relative_error(values[start:stop], matrix) == pytest.approx(1 / 32 / 12**0.5, rel=0.15)  # and clipping at 4 standard deviations
    embedding = Parameters(case.shape).spans["embedding"]
    assert torch.equal(values[slice(*embedding)], case.weights[slice(*embedding)].double())


def test_rounded_model_is_the_model_up_to_rounding() -> None:
    case = make_case(2)
    parameters = Parameters(case.shape, dtype=torch.float64).load(case.weights)
    total = rounded_loss(case.shape, parameters.views, Precision("bfloat16", "bfloat16", True), case.text, case.target)
    exact = Parameters(case.shape, dtype=torch.float64).load(case.weights)
    wanted = Model(case.shape, exact).loss(case.text, case.target)[0]
    assert total.item() == pytest.approx(wanted.item(), rel=2e-3)
    total.backward()
    wanted.backward()
    assert_close("gradient", parameters.flat_grad, exact.flat_grad, 0.05)


def test_int8_is_within_its_limits() -> None:
    found = compare("int8/bfloat16", 1, CPU)
    assert not excesses("int8/bfloat16", [found])
    assert found.forward > 0.5, "int8 states do change predictions"


def test_verdict_names_what_is_over_the_limit() -> None:
    limits = ROWS["int8/fp8"]
    fine = Difference(limits.forward, limits.step, {"final": limits.gradient}, {"final": 0.9999}, {"final": 900.0})
    assert not excesses("int8/fp8", [fine])
    bad = dataclasses.replace(fine, forward=limits.forward * 1.1, cosines={"final": 0.99})
    assert "forward" in excesses("int8/fp8", [bad])[0] and "cosine of final" in excesses("int8/fp8", [bad])[1]
    assert "over its limits" in table_lines({"int8/fp8": [bad]})[-1]


def test_whole_run_on_the_processor(tmp_path: Path) -> None:
    out = tmp_path / "precision.json"
    assert main(["bench", "precision", "--rows", "bfloat16", "--seeds", "1", "--device", "cpu", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["over_limits"] == {"bfloat16": []}
