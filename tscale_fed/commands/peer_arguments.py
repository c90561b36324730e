"""The flags of `tscale-peer`, and what each may hold. Light to import: `--help` must answer at once.

Enters: the command line. Leaves: an `argparse.Namespace` with

    role            "peer" | "seed"                 bootstrap   list[str], addresses as typed
    config          Path | None                     home        Path (never None)
    listen          str | None, "host:port"         advertise   list[str], addresses as typed
    device          "auto" | "cpu" | "cuda[:N]"     data_dir    Path | None
    name            str | None                      max_upload, max_download  float | None, bytes per second
    threads         int | None                      seconds     float | None
    solo, require_id, json_log, debug               bool

What an address or a run file holds is checked by its owner (tscale_net.address, tscale_fed.config), which says what is wrong with it.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from tscale_fed import __version__
from tscale_fed.units import parse_rate

LONGEST_NAME_CHARACTERS = 32
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

DESCRIPTION = "Join a run and train: connects, fetches what it needs from the swarm, trains on this machine, exchanges deltas."

EPILOG = """examples:
  tscale-peer --role seed --config configs/demo-cpu.toml    start a run; prints the line that others type
  tscale-peer --bootstrap host.example.net:7700             join it: nothing else is needed
  tscale-peer --bootstrap 12D3KooW...@host:7700             the same, with the seed's identity pinned
  tscale-peer                                               go on with the run that this home knows
  tscale-peer doctor                                        look at this machine and its network, with fixes
  tscale-peer sim --help                                    simulate whole swarms on this machine instead

Ctrl+C once publishes what is left and leaves; twice stops at once. tscale-status shows a running peer.
exit codes: 0 done, 1 refused or failed (one sentence says why and what to do), 2 wrong command line, 130 stopped by Ctrl+C twice.
"""


def _rate(text: str) -> float:
    try:
        return parse_rate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _listen(text: str) -> str:
    """`host:port`, `[::]:7700`, `:7700` or `7700` -> `host:port`."""
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not HOST:PORT: write for example 0.0.0.0:7700, or 7700 alone for all addresses")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise argparse.ArgumentTypeError(f"'{text}': put an IPv6 address in brackets, for example [::]:7700")
    return f"{host or '0.0.0.0'}:{int(port)}"


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a device: use auto, cpu, cuda or cuda:N")
    return text


def _name(text: str) -> str:
    if len(text) > LONGEST_NAME_CHARACTERS or not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"a name has at most {LONGEST_NAME_CHARACTERS} letters, digits, dots, dashes or underscores")
    return text


def _positive_int(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def positive_seconds(text: str) -> float:
    """The value of a `--seconds` flag."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds above 0")
    return value


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(os.path.expanduser(text))


def add_home_argument(parser: argparse._ActionsContainer, help_text: str) -> None:
    """`--home DIR`, the same for every program; the default is filled in by `resolve_home`."""
    parser.add_argument("--home", type=_path, metavar="DIR", help=help_text)


def resolve_home(arguments: argparse.Namespace) -> None:
    """Put the default in place of a missing `--home`. The environment is read here and nowhere below."""
    if arguments.home is None:
        from tscale_fed.home import default_home

        arguments.home = default_home(os.environ)


def peer_parser() -> argparse.ArgumentParser:
    """The parser of `tscale-peer`."""
    parser = argparse.ArgumentParser(
        prog="tscale-peer", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    run = parser.add_argument_group("which run")
    run.add_argument(
        "--bootstrap",
        action="append",
        default=[],
        metavar="ADDR",
        help="a reachable peer: host:port, id@host:port or /ip4/../tcp/../p2p/id; may be given several times",
    )
    run.add_argument("--role", choices=("peer", "seed"), default="peer", help="seed: create or anchor the run, and stay up (default: peer)")
    run.add_argument("--config", type=_path, metavar="FILE", help="run file (TOML) of a new run; only for --role seed and --solo")
    run.add_argument("--solo", action="store_true", help="train without any connection; join later with --bootstrap from the same home")

    machine = parser.add_argument_group("this machine")
    add_home_argument(machine, "identity, checkpoints, delta log, control socket (default: tscale-fed in your data directory)")
    machine.add_argument("--device", type=_device, default="auto", metavar="DEV", help="auto, cpu, cuda or cuda:N (default: auto)")
    machine.add_argument("--threads", type=_positive_int, metavar="N", help="CPU threads for training (default: torch decides)")
    machine.add_argument("--data-dir", type=_path, metavar="DIR", help="where token shards lie or are put (default: in the home)")
    machine.add_argument("--name", type=_name, metavar="NAME", help="name shown to others (default: two words made from the identity)")

    network = parser.add_argument_group("network")
    network.add_argument(
        "--listen",
        type=_listen,
        metavar="HOST:PORT",
        help="listen here, and on the next port for strangers (default: 0.0.0.0:7700; peers take the next free pair)",
    )
    network.add_argument(
        "--advertise", action="append", default=[], metavar="ADDR", help="address at which others reach this peer, if it cannot tell itself"
    )
    network.add_argument("--max-upload", type=_rate, metavar="RATE", help="upload limit in bits per second (20M, 500k) or bytes (2.5MB/s)")
    network.add_argument("--max-download", type=_rate, metavar="RATE", help="download limit, likewise; the swarm publishes as it allows")
    network.add_argument(
        "--require-id", action="store_true", help="refuse a bootstrap address without a peer id, instead of trusting the first contact"
    )

    running = parser.add_argument_group("running")
    running.add_argument("--seconds", type=positive_seconds, metavar="N", help="leave cleanly after so many seconds")
    running.add_argument("--json-log", action="store_true", help="print one JSON object per line")
    running.add_argument("--debug", action="store_true", help="show Python tracebacks")
    running.add_argument("--version", action="version", version=f"tscale-peer {__version__}")
    return parser


def check_peer_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse combinations that cannot mean anything (exit code 2, one sentence)."""
    if arguments.solo and (arguments.bootstrap or arguments.role == "seed"):
        parser.error("--solo trains without connections: leave out --bootstrap and --role seed")
    if arguments.config is not None and arguments.role != "seed" and not arguments.solo:
        parser.error("--config starts a new run and needs --role seed (or --solo): a joining peer takes the run from the swarm")
