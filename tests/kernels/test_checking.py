"""What checks the kernels, checked itself: comparisons see what is wrong, scripts survive it, the gate refuses it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from case_protocol import FULL, GATE, ONE_CODE_OFF, SMALL, TINY, AttentionSize, Case, Setting, compare, relative_error

from tscale_kernels import dispatch
from tscale_kernels.codes import CODE_DTYPES

HERE = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(not dispatch.has_triton(), reason="triton is not installed (pip install 'tscale-fed[interp]')")


def run_script(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, str(HERE / name), *words], env=environment, capture_output=True, text=True, check=False)


Scripts = dict[str, Future[subprocess.CompletedProcess[str]]]
ON_CPU = ("sabotage_cases", "--device=cpu", "--processes", "1")


@pytest.fixture(scope="module")
def scripts() -> Iterator[Scripts]:
    """The scripts that tests here ask for, two at a time, since each mostly starts processes and imports torch."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            "sabotage": pool.submit(run_script, "gpu_check.py", *ON_CPU, "--sizes", "tiny", "--seconds", "60"),
            "late": pool.submit(run_script, "gpu_check.py", *ON_CPU, "--seconds", "0.1", "--only", "right"),
            "no gpu": pool.submit(run_script, "gpu_check.py", "--only", "no such case"),
            "casts": pool.submit(run_script, "interpreted_casts.py"),
        }


@pytest.mark.parametrize("dtype", CODE_DTYPES)
def test_neighbouring_codes_are_told_from_distant_ones(dtype: torch.dtype) -> None:
    want = torch.randn(200, 200).mul(20).to(dtype)
    got = want.clone()
    got.view(torch.uint8 if dtype.itemsize == 1 else torch.int16)[3, 5] += 1
    assert compare("y", got, want, ONE_CODE_OFF)[0] and not compare("y", got, want, 0)[0]
    got.view(torch.uint8 if dtype.itemsize == 1 else torch.int16)[3, 5] += 1
    assert not compare("y", got, want, ONE_CODE_OFF)[0]
    got = want.clone()
    got.view(torch.uint8 if dtype.itemsize == 1 else torch.int16)[:1, :5] += 1  # 5 of 40,000 are more than 1e-4
    good, text = compare("y", got, want, ONE_CODE_OFF)
    assert not good and "first at [0, 0]" in text


def test_codes_around_zero_are_neighbours() -> None:
    zeros = torch.tensor([0.0, -0.0], dtype=torch.float8_e4m3fn).repeat(10_000)
    other = zeros.clone()
    other.view(torch.uint8)[0] = 0x81  # the smallest negative number beside plus zero
    assert compare("y", other, zeros, ONE_CODE_OFF)[0]


def test_nan_infinity_and_shape_are_errors() -> None:
    ones = torch.ones(3, 4)
    for bad in (math.nan, math.inf):
        wrong = ones.clone()
        wrong[1, 2] = bad
        assert relative_error(wrong, ones) == math.inf and relative_error(ones, wrong) == math.inf and relative_error(wrong, wrong) == 0
    assert not compare("y", ones[:2], ones, 1.0)[0] and not compare("y", ones.double(), ones, 1.0)[0]
    assert compare("y", ones * 1.001, ones, 2e-3)[0] and not compare("y", ones * 1.001, ones, 5e-4)[0]


def test_operations_of_a_case() -> None:
    narrow = AttentionSize(fragments=2, heads=3, tokens=5, width=2, part="forward")
    assert narrow.operations == 2 * 3 * (0 + 1 + 2 + 2 + 2) * 4 * 128
    case = Case(lambda: {}, lambda out, backend: None, {}, matmul=(10, 20, 30), attention=narrow)
    assert case.operations == 2 * 10 * 20 * 30 + narrow.operations


@pytest.mark.parametrize("sizes", [TINY, GATE, SMALL], ids=lambda sizes: sizes.name)
def test_inputs_are_what_ops_ask_for(sizes: Any) -> None:
    setting = Setting(sizes, torch.device("cpu"), seed=5)
    start = setting.document_start()
    position = torch.arange(sizes.rows) % sizes.tokens
    assert start.dtype == torch.int32 and bool(((start >= 0) & (start <= position)).all()) and int(start.max()) > 0
    codes = setting.vector_codes(sizes.rows, sizes.width, torch.int8)
    assert codes[: sizes.tokens].float().square().mean().sqrt() == pytest.approx(24, rel=0.05)
    assert int(codes[sizes.fragments * sizes.tokens :].abs().sum()) == 0
    assert sizes.rows % 128 == 0 and FULL.rows == 24 * 1024
    again = Setting(sizes, torch.device("cpu"), seed=5)
    assert torch.equal(again.document_start(), start) and again.rotary()[0].shape == (sizes.tokens, 64)


@needs_triton
def test_a_check_reports_what_is_wrong_and_goes_on(scripts: Scripts) -> None:
    done = scripts["sabotage"].result()
    assert done.returncode == 1, done.stderr
    summary = done.stdout.partition("\n\n")[2]
    assert "8 cases: 2 passed, 5 failed, 1 skipped" in summary
    assert "forgets an element @tiny" in summary and "1/32 elements differ; first at [3, 7]" in summary
    assert "writes NaN @tiny" in summary and "inf (limit" in summary
    assert "dies @tiny (0.0 s): the process ended with code 9" in summary
    assert "ValueError: does not compile" in summary and "illegal memory access" in summary
    assert "PASS right again @tiny" in done.stdout


@needs_triton
def test_a_check_that_does_not_end_is_named(scripts: Scripts) -> None:
    done = scripts["late"].result()
    assert done.returncode == 1 and "had not ended after 0 s" in done.stdout


def test_without_a_gpu_the_check_says_so(scripts: Scripts) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = scripts["no gpu"].result()
    assert done.returncode == 2 and "no CUDA device" in done.stderr


@needs_triton
def test_the_interpreter_is_right_for_bf16_and_fp8(scripts: Scripts) -> None:
    done = scripts["casts"].result()
    assert done.returncode == 0, done.stderr[-2000:]


@needs_triton
def test_the_gate_refuses_what_it_should() -> None:
    import ahead_of_time

    def compiled(**changes: Any) -> Any:
        facts: dict[str, Any] = dict(
            case="c", kernel="k", card=90, registers=100, stack_bytes=0, shared_bytes=98304, instructions={"IGMMA": 8, "UTMALDG": 6},
            operand_types=frozenset({"i8"}), seconds=1.0, loads_descriptors=True, is_product=True, config="4 warps 3 stages",
        )  # fmt: skip
        return ahead_of_time.Compiled(**{**facts, **changes})

    assert compiled().faults() == []
    assert compiled(card=89, instructions={"IMMA": 32}, loads_descriptors=False).faults() == []
    fp8 = frozenset({"f8E4M3FN"})
    assert compiled(card=100, instructions={"UTCQMMA": 8, "UTMALDG": 8}, operand_types=fp8).faults() == []
    assert "no tensor-core instruction for f8E4M3FN" in compiled(instructions={"HGMMA": 8, "UTMALDG": 6}, operand_types=fp8).faults()[0]
    assert "16-bit tensor-core" in compiled(instructions={"IGMMA": 8, "HMMA": 2, "UTMALDG": 6}).faults()[0]
    assert compiled(instructions={"IMMA": 8, "UTMALDG": 6}).faults(), "sm_90 has the faster IGMMA"
    assert "stack" in compiled(stack_bytes=16).faults()[0]
    assert "shared memory" in compiled(card=86, instructions={"IMMA": 1}, loads_descriptors=False, shared_bytes=102_400).faults()[0]
    assert "UTMALDG" in compiled(instructions={"IGMMA": 8}).faults()[0]
    assert "without descriptors" in compiled(instructions={"IGMMA": 8}, loads_descriptors=False).faults()[0]
