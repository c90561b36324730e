"""The bench of several GPUs: its table, its slow line, and whole tiny runs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tscale_fed.bench.parallel_table import table_lines
from tscale_fed.bench.slow_link import LOOPBACK, Lane, SlowLink
from tscale_fed.cli import main


def test_the_table_compares_with_one_gpu_and_tells_what_failed() -> None:
    one = {"row": "one", "ranks": 1, "tokens_per_s": 100.0, "ms_per_step": 10.0, "held_out_loss": [[5, 3.0]]}
    two = {**one, "row": "exact", "ranks": 2, "tokens_per_s": 180.0, "bytes_per_step_and_rank": 4000, "bytes_per_weight": 4.0}
    lines = table_lines([one, two, {"row": "swarm", "ranks": 2, "failure": "nobody came"}])
    assert "1.80" in lines[2] and "90.0%" in lines[2] and "4.0 kB" in lines[2]
    assert lines[3] == "swarm: nobody came"


def test_a_lane_is_shared_by_what_goes_through_it() -> None:
    lane = Lane(bytes_per_s=1000.0, delay_s=0.5)
    assert lane.arrival_s(100, now_s=10.0) == pytest.approx(10.6)
    assert lane.arrival_s(100, now_s=10.0) == pytest.approx(10.7), "the second waits for the first"
    assert lane.arrival_s(100, now_s=20.0) == pytest.approx(20.6)
    assert Lane(delay_s=0.1).arrival_s(10**9, now_s=1.0) == pytest.approx(1.1)
    assert lane.moved_bytes == 300


async def test_a_slow_link_carries_everything_in_order_both_ways_and_ends_with_its_ends() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(1 << 16):
            writer.write(chunk)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, LOOPBACK, 0)
    link = SlowLink(LOOPBACK, server.sockets[0].getsockname()[1])
    link.limit(bytes_per_s=100e6, delay_s=0.001)
    reader, writer = await asyncio.open_connection(LOOPBACK, await link.open())
    sent = bytes(range(256)) * 4096
    writer.write(sent)
    writer.write_eof()
    assert await reader.read(-1) == sent
    assert link.there.moved_bytes == link.back.moved_bytes == len(sent)
    writer.close()
    await link.close()
    server.close()


async def test_a_slow_link_to_nobody_ends_the_connection() -> None:
    server = await asyncio.start_server(lambda reader, writer: None, LOOPBACK, 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    link = SlowLink(LOOPBACK, port)
    reader, writer = await asyncio.open_connection(LOOPBACK, await link.open())
    assert await reader.read(-1) == b""
    writer.close()
    await link.close()


@pytest.mark.slow
def test_the_rows_of_a_tiny_run(tmp_path: Path) -> None:
    """The command itself; what its processes do is among the scenes of test_parallel.py."""
    out = tmp_path / "found.json"
    assert main(["bench", "parallel", "--preset", "tiny", "--device", "cpu", "--steps", "8", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    one, exact, onebit = found["rows"]
    assert [row["row"] for row in found["rows"]] == ["one", "exact", "onebit"]
    assert exact["tokens_per_step"] == onebit["tokens_per_step"] == 2 * one["tokens_per_step"]
    assert exact["replicas"] == onebit["replicas"] == "bit-identical"
    assert exact["bytes_per_weight"] == pytest.approx(4.0) and onebit["bytes_per_weight"] < 0.14
    assert len(exact["train_loss"]) == 8 and exact["held_out_loss"][-1][0] == exact["train_loss"][-1][0]
    assert found["machine"]["gpu"] is None and "folder" not in found["sizes"]


@pytest.mark.slow
def test_a_tiny_swarm_behind_slow_lines(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    assert main(["bench", "parallel", "--preset", "tiny", "--device", "cpu", "--steps", "60", "--rows", "swarm", "--out", str(out)]) == 0
    (swarm,) = json.loads(out.read_text())["rows"]
    assert swarm["replicas"] == "bit-identical" and swarm["ranks"] == 2
    assert swarm["train_loss"][-1][0] >= 60 * 2 * 30
    assert swarm["relayed_bytes"] > 0.5 * swarm["sent_bytes"], "packets went through the slow lines"
