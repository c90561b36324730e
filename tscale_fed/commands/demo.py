"""`tscale demo`: a seed and two peers as three processes on this machine learn real text together. See tscale_fed/demo.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tscale_fed.commands.peer_arguments import positive_seconds
from tscale_fed.limits import DEMO_SECONDS

EXIT_TERMINATED = 143
"""As shells report a program that SIGTERM ended."""
DEMO_CONFIG = Path(__file__).resolve().parent.parent.parent / "configs" / "demo-cpu.toml"


def add_parser(subparsers: Any) -> None:
    """Describe the command to `tscale`'s parser."""
    parser = subparsers.add_parser("demo", help="a seed and two peers on this machine, learning real text", allow_abbrev=False)
    parser.add_argument(
        "--seconds", type=positive_seconds, default=DEMO_SECONDS, metavar="N", help=f"length of the training (default: {DEMO_SECONDS:.0f})"
    )
    parser.add_argument("--config", type=Path, default=DEMO_CONFIG, metavar="FILE", help="run file (default: configs/demo-cpu.toml)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="put homes and logs here and keep them (default: a temporary folder)")


def run(arguments: argparse.Namespace) -> int:
    """Raises Refused if the run file is missing or a process of the demo dies."""
    import asyncio

    from tscale_fed.demo import demo
    from tscale_net.errors import Refused

    if not arguments.config.is_file():
        raise Refused(
            "no-config", f"{arguments.config} does not exist: run the demo from a checkout, or name a run file with --config FILE"
        )
    try:
        return asyncio.run(demo(arguments.config, arguments.seconds, arguments.keep))
    except asyncio.CancelledError:
        return EXIT_TERMINATED
