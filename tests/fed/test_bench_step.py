"""The step bench: its arithmetic, its goal, and a whole run at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tscale_fed.bench.kernel_profile import short_name
from tscale_fed.bench.machine import command_text
from tscale_fed.bench.step_measure import Timed
from tscale_fed.bench.step_rows import Sizes, zipf_batches
from tscale_fed.bench.step_table import figures, goal_met, table_lines
from tscale_fed.cli import main
from tscale_fed.model.shape import ModelShape

BIG = Sizes(ModelShape.parse("e1280h20d42w1024", vocab=50257), 24, 1024, torch.device("cpu"))


def timed(name: str, milliseconds: float, **more: int) -> Timed:
    return Timed(name, [milliseconds] * 10, **more)  # type: ignore[arg-type]


def test_the_command_of_a_result_names_no_place_of_the_machine() -> None:
    typed = ["bench", "step", "--rows", "int8", "--text", "/data/some/text.xz", "--out", "/tmp/x.json"]
    assert command_text(typed) == "tscale bench step --rows int8 --text text.xz"
    assert command_text(["step", "--out=/tmp/x.json", "--top", "3"]) == "tscale bench step --top 3"


def test_counts_with_and_without_the_embedding() -> None:
    row = timed("int8", 354.0)
    found = figures(BIG, row, [timed("baseline", 534.0), row])
    assert found["tokens_per_s"] == pytest.approx(24 * 1024 / 0.354)
    assert found["tparams_per_s"] == pytest.approx(100.0, rel=0.01)
    assert found["tparams_per_s_with_embedding"] == pytest.approx(104.5, rel=0.01)
    assert found["times_baseline"] == pytest.approx(534 / 354)
    assert found["of_limit"] == pytest.approx(0.55, abs=0.01)


def test_goal_needs_speed_the_ratio_and_little_memory_on_the_host() -> None:
    base, fast = timed("baseline", 534.0), timed("int8", 350.0)
    assert goal_met("big", BIG, [base, fast])
    assert not goal_met("big", BIG, [fast]), "without the baseline there is no ratio"
    assert not goal_met("big", BIG, [timed("baseline", 400.0), fast])
    assert goal_met("big", BIG, [base, fast, timed("int8@host", 700.0, peak_bytes=12 * 10**9, host_bytes=17 * 10**9)])
    assert not goal_met("big", BIG, [base, fast, timed("int8@host", 700.0, peak_bytes=13 * 10**9, host_bytes=17 * 10**9)])


def test_a_row_that_failed_says_why_in_the_table() -> None:
    assert "no fp8 here" in table_lines(BIG, [Timed("fp8/fp8", failure="no fp8 here")])[-1]


def test_batches_are_those_of_the_sizes_and_frequent_tokens_are_frequent() -> None:
    sizes = Sizes(ModelShape.parse("e128h1d2", vocab=1000), 8, 64, torch.device("cpu"))
    text, target = zipf_batches(sizes, 1, seed=1)[0]
    assert text.shape == target.shape == (8, 64)
    assert (target[:, 0] == -1).all() and torch.equal(target[:, 1:-1], text[:, 2:])
    assert (text < 10).sum() > (text >= 500).sum()


def test_whole_run_on_the_processor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    words = ["--dims", "e128h1d2w16", "--fragments", "2", "--tokens", "32", "--vocab", "50", "--steps", "3", "--device", "cpu"]
    assert main(["bench", "step", *words, "--rows", "baseline", "--out", str(out)]) == 1
    values = json.loads(out.read_text())
    assert [len(row["milliseconds"]) for row in values["rows"]] == [3]
    assert "baseline" in capsys.readouterr().out


def test_kernel_names_are_short() -> None:
    assert short_name("void at::native::vectorized_elementwise_kernel<4, at::native::Fill>(int)") == "vectorized_elementwise_kernel"
    assert short_name("triton_red_fused_add_mul_3") == "triton_red_fused_add_mul_3"
