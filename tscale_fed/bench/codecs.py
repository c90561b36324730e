"""`tscale bench codecs`: what each codec costs on the wire and in time, and how much of a displacement it sends.

Enters: names of codecs, a number of parameters, a device. Leaves: a table and a JSON file. Displacements are drawn (Gaussian, and with
heavy tails); --payloads trains small swarms instead and says whether compressing their payloads once more would gain anything.

    tscale bench codecs                          every codec on the processor; took a minute on one core
    tscale bench codecs --device cuda            on a GPU, 2**27 parameters
    tscale bench codecs --payloads               lz4, deflate and (if installed) zstd on payloads of training; took 4 minutes
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tscale_fed.bench.options import count

CODECS = ("sign", "topk-sign", "topk-2bit", "topk-sign-256", "int8", "int4", "lowrank", "exact")
GOALS = {"sign": 0.128, "topk-sign": 0.0170}
"""Bytes per parameter with header and signature: missed is an exit code of 1."""
PARAMETERS = {"cpu": 1 << 22, "cuda": 1 << 27}
PAYLOAD_STEPS = 60


def add_parser(subparsers: Any) -> None:
    """Describe the bench."""
    parser = subparsers.add_parser("codecs", help="bytes, time and contraction of every codec", allow_abbrev=False)
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), metavar="NAME", help="default: one of every kind")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--parameters", type=count, metavar="N", help="default: 2**22 on the processor, 2**27 on a GPU")
    parser.add_argument(
        "--columns", type=count, default=1280, metavar="N", help="length of the rows, a multiple of 8 (default: %(default)s)"
    )
    parser.add_argument("--threads", type=count, default=1, metavar="N", help="of the processor (default: %(default)s)")
    parser.add_argument("--payloads", action="store_true", help="compress payloads of small training runs instead")
    parser.add_argument("--steps", type=count, default=PAYLOAD_STEPS, metavar="N", help="of these runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file (default: docs/bench/codecs.json, codecs-payloads.json)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write. Raises Refused: "packet-codec", "bad-device"; OSError for the file."""
    import torch

    from tscale_fed.bench.machine import command_text, machine_facts, result_path, write_result
    from tscale_net.ports import SystemClock
    from tscale_peers.codec import codec_named

    torch.set_num_threads(arguments.threads)
    for name in arguments.codecs:
        codec_named(name)
    rows = _payload_rows(arguments) if arguments.payloads else _cost_rows(arguments)
    path = result_path("codecs-payloads" if arguments.payloads else "codecs", arguments.out)
    machine = machine_facts(arguments.device, SystemClock().wall())
    write_result(path, {"bench": "codecs", "command": command_text(), "machine": machine, "rows": rows})
    print(f"\n{path}")
    late = [row["codec"] for row in rows if not arguments.payloads and row["bytes_per_parameter"] > GOALS.get(row["codec"], 8.0)]
    for name in late:
        print(f"{name}: more than the goal of {GOALS[name]} bytes per parameter")
    return int(bool(late))


def _cost_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from tscale_fed.bench.codec_costs import Subject, addition_ns, costs_of
    from tscale_fed.device import choose_device

    device = choose_device(arguments.device).torch_device
    subject = Subject(arguments.parameters or PARAMETERS[device.type], arguments.columns, device)
    plain_ns = addition_ns(subject)
    print(f"fp32 addition W += d: {plain_ns:.4f} ns per parameter; {subject.parameters} parameters in rows of {arguments.columns}")
    print("                  bytes per          ns per parameter            encode, open, apply          ||d-q||^2 / ||d||^2")
    print("codec             parameter   encode     open    apply     leak   in fp32 additions      Gaussian   heavy tails")
    rows = []
    for name in arguments.codecs:
        costs = costs_of(name, subject)
        ratio = (costs.encode_ns + costs.open_ns + costs.apply_ns) / plain_ns
        print(
            f"{name:16s} {costs.bytes_per_parameter:10.5f} {costs.encode_ns:8.3f} {costs.open_ns:8.3f} {costs.apply_ns:8.3f} "
            f"{costs.leak_ns:8.3f} {ratio:20.1f} {costs.left_gaussian:15.4f} {costs.left_heavy:13.4f}",
            flush=True,
        )
        rows.append({"codec": name, "addition_ns": plain_ns, "additions": ratio, **costs.values()})
    return rows


def _payload_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from tscale_fed.bench.codec_payloads import COMPRESSORS, gains_of

    names = list(COMPRESSORS)
    print(f"payloads of the second half of {arguments.steps} steps; what a compressor takes off, per cent (below 0: it adds)")
    print(f"{'codec':16s} {'bytes per parameter':>20s} " + " ".join(f"{name:>12s}" for name in names))
    rows = []
    for name in arguments.codecs:
        gains = gains_of(name, arguments.steps)
        shown = " ".join(f"{100 * gains.taken_off[compressor]:12.1f}" for compressor in names)
        print(f"{name:16s} {gains.bytes_per_parameter:20.4f} {shown}", flush=True)
        rows.append({"codec": name, **gains.values()})
    return rows
