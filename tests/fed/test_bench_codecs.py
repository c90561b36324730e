"""Bench codecs: figures that have an exact value, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tscale_fed.bench.codec_costs import Subject, costs_of
from tscale_fed.cli import main
from tscale_net.errors import Refused

COLUMNS = 256


def subject() -> Subject:
    return Subject(1 << 15, COLUMNS, torch.device("cpu"))


def test_bytes_are_those_of_payloads_header_and_signature() -> None:
    signs = costs_of("sign", subject())
    assert signs.payload_bytes_per_parameter == 1 / 8 + 2 / COLUMNS
    framing = (signs.bytes_per_parameter - signs.payload_bytes_per_parameter) * (1 << 15)
    assert 64 + 2 + 100 < framing < 64 + 2 + 256
    assert costs_of("exact", subject()).payload_bytes_per_parameter == 4.0


def test_what_is_left_is_ordered_as_the_codecs_are() -> None:
    """Gaussian values: one bit leaves 1 - 2 / pi; more bits leave less; the largest alone leave most."""
    left = {name: costs_of(name, subject()).left_gaussian for name in ("exact", "int8", "int4", "sign", "topk-2bit", "topk-sign")}
    assert left["sign"] == pytest.approx(1 - 2 / torch.pi, abs=0.01)
    assert sorted(left, key=lambda name: left[name]) == list(left)


def test_the_command_writes_a_row_per_codec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "codecs.json"
    command = ["bench", "codecs", "--codecs", "sign", "topk-2bit-8", "--parameters", "16384", "--columns", "128", "--out", str(out)]
    assert main(command) == 1, "short rows: a scale per row takes sign above its goal"
    assert [row["codec"] for row in json.loads(out.read_text())["rows"]] == ["sign", "topk-2bit-8"]
    assert "sign: more than the goal" in capsys.readouterr().out


def test_payloads_of_training_are_compressed(tmp_path: Path) -> None:
    out = tmp_path / "payloads.json"
    assert main(["bench", "codecs", "--payloads", "--codecs", "topk-sign", "--steps", "5", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["payloads"] > 0 and set(row["taken_off"]) >= {"lz4", "deflate"}
    assert 0.01 < row["bytes_per_parameter"] < 0.05


def test_unknown_codecs_are_refused_before_anything_is_measured() -> None:
    with pytest.raises(Refused, match="'zip' is not known"):
        costs_of("zip", subject())
    assert main(["bench", "codecs", "--codecs", "zip"]) != 0
