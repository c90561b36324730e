"""`tscale-status`: look at the peer that runs on this machine. Closing or killing it never touches training.

Enters: a home directory. Leaves: the status screen on a terminal; one page of text elsewhere; one JSON snapshot with `--json`.
"""

from __future__ import annotations

import argparse
import os
import sys

from tscale_fed import __version__
from tscale_fed.commands.peer_arguments import add_home_argument

DESCRIPTION = "Show the peer that runs on this machine: swarm, itself, other peers, wire, loss curve, events."
EPILOG = """On a terminal this is a live screen (q leaves it, ? lists the keys); elsewhere it prints one page and ends.
exit codes: 0 done, 1 no peer runs with this home (or it does not answer), 2 wrong command line.
"""


def status_parser() -> argparse.ArgumentParser:
    """The parser of `tscale-status`."""
    parser = argparse.ArgumentParser(
        prog="tscale-status",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_home_argument(parser, "home of the peer (default: tscale-fed in your data directory)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one snapshot as JSON")
    form.add_argument("--text", action="store_true", help="print one page of text, also on a terminal")
    parser.add_argument("--debug", action="store_true", help="show Python tracebacks")
    parser.add_argument("--version", action="version", version=f"tscale-status {__version__}")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Raises Refused if no peer runs with the home. The screen itself waits for a peer that is gone."""
    from tscale_fed.control_client import ControlClient
    from tscale_fed.status import encode
    from tscale_fed.status_text import page

    client = ControlClient(arguments.home)
    snapshot = client.snapshot()
    if arguments.json:
        print(encode(snapshot).decode(), flush=True)
    elif arguments.text or not _is_interactive():
        print(page(snapshot), flush=True)
    else:
        from tscale_fed.tui.app import StatusApp

        StatusApp(arguments.home, first=snapshot).run()
    return 0


def _is_interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
