"""The kernel bench without a GPU: what it prints, what it leaves out, that one broken case does not stop the rest."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tscale_fed.bench import kernel_baselines, kernel_timing, kernels
from tscale_fed.bench.kernel_rows import Row, table_lines
from tscale_fed.cli import main

CPU = torch.device("cpu")


def pretended_timing(calls: list[kernel_timing.Call]) -> kernel_timing.Timing:
    for call in calls:
        call()
    return kernel_timing.Timing(ms=2.0, launch_us=9.0, spread=0.01, graph=True)


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The cases' folder can be imported from; timing is pretended: 2 ms each."""
    monkeypatch.syspath_prepend(str(kernels.cases_folder()))
    monkeypatch.setattr(kernel_timing, "rotations", lambda bytes_moved, device: 2)
    monkeypatch.setattr(kernel_timing, "time_calls", pretended_timing)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    protocol, run_cases = importlib.import_module("case_protocol"), importlib.import_module("run_cases")

    def product(setting: Any) -> Any:
        runs: list[str] = []
        return protocol.Case(lambda: {}, lambda out, backend: runs.append(backend), {}, matmul=(2, 3, 5), bytes_moved=10**9)

    def broken(setting: Any) -> Any:
        raise RuntimeError("does not fit")

    def odd_shape(setting: Any) -> Any:
        return protocol.Case(lambda: {}, lambda out, backend: None, {}, timed=False)

    chosen = {"product": product, "broken": broken, "odd shape": odd_shape, "wrong": product, "product 2": product}
    monkeypatch.setattr(run_cases, "load_cases", lambda modules, wanted=None, without=None: chosen)
    return chosen


def rows_of(names: list[str], in_time: bool = True) -> list[Row]:
    arguments = argparse.Namespace(sizes=["small"], only=[], all=False, seconds=5.0)
    return kernels.timed_rows(arguments, [f"{name} @small" for name in names], CPU, lambda: in_time)


def test_a_broken_case_is_reported_and_the_rest_timed(cases: Any) -> None:
    rows = rows_of([name for name in cases if name != "wrong"])
    assert [row.case for row in rows] == ["product", "broken", "product 2"]
    assert "does not fit" in rows[1].error and rows[0].beside == {"bf16 mm": 2.0}
    lines = "\n".join(table_lines(rows, copy_gb_s=1000.0))
    assert "FAILED" in lines and "bf16 mm 2.000 (1.00x)" in lines and "50%" in lines


def test_what_is_not_timed_in_time_says_so(cases: Any) -> None:
    assert all("5 s were over" in row.error for row in rows_of(["product", "product 2"], in_time=False))


def test_figures_follow_from_the_measured_time(cases: Any) -> None:
    row = Row("s", "c", ms=0.5, operations=10**12, bytes_moved=10**9)
    assert row.tops == pytest.approx(2000) and row.gb_s == pytest.approx(2000)
    assert json.loads(json.dumps(row.values()))["tops"] == 2000.0
    failed = kernels.failed_row("attend int8 @full", "too far off")
    assert failed.size.startswith("e1280") and failed.case == "attend int8" and failed.error == "too far off"


def test_result_file_is_named_after_the_card() -> None:
    assert kernels.card_name("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert kernels.card_name("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"


def test_baseline_attention_is_ours() -> None:
    """Causal attention over shifted keys with a zero in front = strict past with a zero sink."""
    query, key, value = torch.randn(3, 2, 2, 7, 128, dtype=torch.float64)
    got = functional.scaled_dot_product_attention(query, kernel_baselines.shifted(key), kernel_baselines.shifted(value), is_causal=True)
    weight = torch.exp(query @ key.transpose(-1, -2) / 128**0.5) * torch.ones(7, 7, dtype=torch.float64).tril(-1)
    want = weight @ value / (1 + weight.sum(-1, keepdim=True))
    torch.testing.assert_close(got, want)


def test_without_a_gpu_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["bench", "kernels"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_timing_on_a_gpu(tmp_path: Path) -> None:
    x, y = torch.zeros(2, 1 << 26, dtype=torch.uint8, device="cuda")
    timing = kernel_timing.time_calls([lambda: y.copy_(x)])
    assert timing.graph and 1e-3 < timing.ms < 5
    with_sync = kernel_timing.time_calls([lambda: torch.cuda.synchronize() or y.copy_(x)])
    assert not with_sync.graph and with_sync.ms == pytest.approx(timing.ms, rel=3)


def test_it_runs_as_a_script() -> None:
    script = Path(__file__).parents[1] / "bench/run_kernels.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--sizes" in done.stdout
