"""`tscale-peer doctor`: looks at this machine and its network; see tscale_fed/doctor/.

Enters: flags. Leaves: one line per check with verdict and fix; exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import asyncio

from tscale_fed.commands.peer_arguments import add_home_argument

DESCRIPTION = "Look at this machine and its network for what would keep a peer from training. Works without network and without GPU."


def doctor_parser() -> argparse.ArgumentParser:
    """The parser of `tscale-peer doctor`."""
    parser = argparse.ArgumentParser(prog="tscale-peer doctor", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--bootstrap", metavar="ADDR", help="ask this peer for clock, round trip and the address it sees")
    add_home_argument(parser, "where the peer's files lie or would lie (default: tscale-fed in your data directory)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--debug", action="store_true", help="show Python tracebacks")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Raises Refused("bad-address") for a bootstrap address that cannot be read."""
    from tscale_fed.doctor.machine import machine_lines
    from tscale_fed.doctor.network import network_lines
    from tscale_fed.doctor.remote import remote_lines
    from tscale_fed.doctor.report import exit_code, json_of, text_of
    from tscale_net.address import parse
    from tscale_net.ports import SystemClock

    if arguments.bootstrap is not None:
        parse(arguments.bootstrap)  # before the slower checks
    lines = machine_lines(arguments.home) + network_lines()
    if arguments.bootstrap is not None:
        lines += asyncio.run(remote_lines(arguments.bootstrap, SystemClock()))
    print(json_of(lines) if arguments.json else text_of(lines))
    return exit_code(lines)
