"""The contraction bench: what it counts, which names it takes, and a whole run at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tscale_fed.bench.contraction_moves import low_rank_moves, noise_moves
from tscale_fed.bench.contraction_ways import CodecWay, FactorsWay, measure, way_named
from tscale_fed.cli import main
from tscale_net.errors import Refused


def test_what_is_counted() -> None:
    """Of equal values: one bit sends all of a displacement, the largest values 64 of 4096."""
    moves = [{"matrix": torch.full((32, 128), 2.0**-10)} for _ in range(3)]
    sign = measure(way_named("sign"), moves)
    assert sign.sent_first == pytest.approx(1.0) and sign.kept_last == pytest.approx(0.0)
    assert sign.bytes_per_parameter == (32 * 2 + 32 * 128 / 8) / (32 * 128)
    largest = measure(way_named("topk-sign"), moves)
    assert largest.sent_first == pytest.approx(64 / 4096) and 2.0 < largest.kept_last < 9.0
    assert all(torch.equal(move["matrix"], torch.full((32, 128), 2.0**-10)) for move in moves)


def test_low_rank_finds_what_noise_does_not_have() -> None:
    alone = measure(way_named("lowrank only"), low_rank_moves(1))
    assert alone.sent_first > 0.75 > 0.1 > measure(way_named("lowrank only"), noise_moves(1)).sent_first
    assert alone.sent_first < measure(way_named("lowrank"), low_rank_moves(1)).sent_first


def test_names() -> None:
    assert isinstance(way_named("lowrank-3 and sign"), FactorsWay)
    assert isinstance(way_named("lowrank-3"), CodecWay)
    for unknown in ("sign only", "lowrank-8", "zip"):
        with pytest.raises(Refused) as caught:
            way_named(unknown)
        assert caught.value.code == "packet-codec"


def test_a_whole_run(tmp_path: Path) -> None:
    out = tmp_path / "contraction.json"
    arguments = ["--dims", "e128h1d1w16", "--first-steps", "1", "--intervals", "1", "--codecs", "sign", "lowrank and sign"]
    assert main(["bench", "contraction", *arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["source"], row["codec"]) for row in rows] == [
        (source, codec) for source in ("noise", "low rank", "training") for codec in ("sign", "lowrank and sign")
    ]
    assert all(0 < row["sent_first"] < 1 for row in rows)
