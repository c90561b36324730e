"""`tscale bench NAME`: measure something on this machine and print a table.

Enters: the name of a bench and its options. Leaves: what the bench prints; exit code 0 if its goals are met, 1 if not.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from tscale_fed.bench import BENCHES


def add_parser(subparsers: Any) -> None:
    """Describe the command and its benches to `tscale`'s parser."""
    parser = subparsers.add_parser("bench", help="measure something on this machine", allow_abbrev=False)
    names = parser.add_subparsers(dest="bench", metavar="NAME", required=True)
    for name in BENCHES:
        _module(name).add_parser(names)


def run(arguments: argparse.Namespace) -> int:
    """Run the bench. Raises what it raises, and Refused("no-device") for a GPU that is not there."""
    if str(getattr(arguments, "device", None)).startswith("cuda"):
        from tscale_fed.device import torch_device

        torch_device(arguments.device)
    return int(_module(arguments.bench).run(arguments))


def _module(name: str) -> Any:
    return importlib.import_module(f"tscale_fed.bench.{name}")
