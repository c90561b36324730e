"""The memory bench: what it complains of, and a whole run at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tscale_fed.bench.memory import complaints, table_lines
from tscale_fed.bench.step_measure import Timed
from tscale_fed.bench.step_rows import Sizes
from tscale_fed.cli import main
from tscale_fed.model.shape import ModelShape

BIG = Sizes(ModelShape.parse("e1280h20d42w1024", vocab=50257), 24, 1024, torch.device("cpu"))


def row(name: str, peak: float, forecast: float, host: float = 0.0) -> Timed:
    return Timed(name, [10.0], peak_bytes=int(peak), host_bytes=int(host), facts={"gpu_bytes": int(forecast), "host_bytes_forecast": 0})


def test_complaints_name_the_plan() -> None:
    fine = ("keep", 24, row("int8/fp8", 40e9, 41e9))
    assert not complaints(BIG, "big", [fine, ("recompute", 24, row("int8/fp8@host", 12e9, 12.1e9, 17e9))])
    assert not complaints(BIG, "big", [("keep", 24, Timed("int8/fp8", failure="out of memory"))])
    told = complaints(BIG, "big", [("recompute", 8, row("int8/fp8@host", 14e9, 12e9, 20e9))])
    assert len(told) == 3 and all(word in told[0] for word in ("int8/fp8@host recompute 8", "14.00", "12.00"))


def test_rows_that_do_not_fit_are_told() -> None:
    assert "does not fit" in table_lines(BIG, [("keep", 24, Timed("int8/fp8", failure="does not fit"))])[-1]


def test_whole_run_on_the_processor(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    sizes = ["--dims", "e128h1d2w8", "--fragments", "2", "--tokens", "16", "--vocab", "20", "--device", "cpu", "--preset", "small"]
    rows = ["--rows", "int8", "int8@host", "--plans", "recompute", "--at-once", "1"]
    assert main(["bench", "memory", *sizes, *rows, "--out", str(out)]) == 0
    device, host = json.loads(out.read_text())["rows"]
    assert 0.99 < host["host_bytes"] / host["facts"]["host_bytes_forecast"] < 1.01 and device["host_bytes"] == 0
    assert device["facts"]["micro_batches"] == 2
