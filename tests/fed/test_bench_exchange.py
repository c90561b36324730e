"""The exchange bench: what it makes of its figures, its arrivals, and a whole run at a tiny size."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from tscale_fed.bench.exchange import table_lines, verdict
from tscale_fed.bench.exchange_load import Arrivals, new_exchange, other_authors_bodies
from tscale_fed.bench.exchange_rows import Measured, Setting
from tscale_fed.cli import main
from tscale_fed.model.shape import ModelShape
from tscale_peers.meeting_time import Seconds
from tscale_peers.packet import Packet
from tscale_peers.packet_log import MemoryLog

SHAPE = ModelShape.parse("e128h1d2w8", 20)
CPU = torch.device("cpu")


def setting_of(**changes: object) -> Setting:
    options = {"codec": "sign", "chunk_params": 1 << 14, "peers": 4, "payloads": None, "interval": 2.0, "step_ms": 10.0, "device": "cpu"}
    return Setting.of(SHAPE, argparse.Namespace(**{**options, **changes}))


def measured(lost_s: float, interval_s: float = 30.0) -> Measured:
    return Measured("row", Seconds(receive=lost_s / 2, publish=lost_s / 4), lost_s / 4, 31.0, interval_s, "Remark.")


def test_the_busy_fraction_is_what_is_not_lost_and_is_told_for_other_intervals() -> None:
    row = measured(lost_s=0.9)
    assert row.busy == pytest.approx(0.97)
    (line,) = table_lines([row])[1:]
    assert line.split()[-3:] == ["97.0%", "98.5%", "99.2%"] and "450" in line and "900" in line
    assert "reached" in verdict(row) and "Remark." in verdict(row)
    assert "aim missed" in verdict(measured(1.2)) and "MISSED" in verdict(measured(3.0)) and measured(60.0).busy == 0


def test_packets_per_interval_follow_from_the_peers_unless_they_are_named() -> None:
    assert setting_of().payloads == 3 and setting_of(peers=16).payloads == 2 and setting_of(payloads=7.0).payloads == 7
    setting = setting_of()
    assert setting.packets_per_s == pytest.approx(3 * len(setting.terms.layout.chunks) / 2.0)


def test_what_arrives_are_new_packets_also_when_they_are_read_back() -> None:
    terms = setting_of().terms
    exchange = new_exchange(terms, CPU, CPU, MemoryLog(), None)
    arrivals = Arrivals(other_authors_bodies(terms, CPU), terms, exchange)
    chunks = len(terms.layout.chunks)
    packets = [arrivals.packet(number)[0] for number in range(2 * chunks)]
    assert [(p.seq, p.chunk) for p in packets] == [(1 + n // chunks, n % chunks) for n in range(2 * chunks)]
    body = arrivals.get(packets[-1].key)
    assert body is not None and Packet.decode(body, terms).key == packets[-1].key
    assert {receipt.outcome for receipt in exchange.receive(packets)} == {"applied"}


def test_whole_run_on_the_processor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "exchange.json"
    options = ["--device", "cpu", "--dims", "e128h1d2w8", "--vocab", "20", "--step-ms", "10", "--interval", "1", "--chunk-params", "16384"]
    assert main(["bench", "exchange", *options, "--out", str(out)]) in (0, 1), "how busy a shared machine is, is not tested"
    beside, host = json.loads(out.read_text())["rows"]
    chunks = json.loads(out.read_text())["setting"]["chunks"]
    assert f"{chunks} packets published" in beside["remark"]
    assert beside["publish_s"] > 0 and host["receive_s"] > 0 and host["hash_s"] > 0 and 0 <= beside["busy"] <= 1
    assert "basepoint on the host" in capsys.readouterr().out
