"""What can be said about a `tscale-peer` command line before anything heavy is loaded, written or dialled.

Enters: the arguments, the home. Leaves: nothing, or one sentence within a fraction of a second instead of after the start of PyTorch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tscale_fed.home import Home
from tscale_net import address
from tscale_net.errors import Refused


def check_early(arguments: argparse.Namespace, home: Home) -> None:
    """Raises Refused: "bad-address", "bad-peer-id", "needs-id", "no-run", "two-runs"."""
    _check_addresses(arguments.bootstrap, arguments.require_id)
    if not home.manifest.exists():
        _check_source(bool(arguments.bootstrap), arguments.config is not None)


def _check_addresses(addresses: Sequence[str], require_id: bool) -> None:
    for text in addresses:
        if address.parse(text).peer_id is None and require_id:
            detail = f"{text}: --require-id asks for an address with a peer id, such as 12D3KooW…@{text}; the seed prints it"
            raise Refused("needs-id", detail)


def _check_source(joins: bool, starts: bool) -> None:
    """A home without a run gets it from exactly one place."""
    if joins and starts:
        raise Refused(
            "two-runs", "this home holds no run yet: --config would start a new one, --bootstrap would join another; leave one of them out"
        )
    if not joins and not starts:
        raise Refused(
            "no-run",
            "this home holds no run yet: join one with --bootstrap HOST:PORT, or start one with --role seed --config configs/demo-cpu.toml",
        )
