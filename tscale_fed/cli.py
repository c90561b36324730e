"""The three programs: `tscale-peer` runs a peer, `tscale-status` looks at one, `tscale` does everything else.

Enters: the command line. Leaves: an exit code. This is the one place where errors become sentences on stderr:

    0    done
    1    refused or failed; one sentence says what, where and what to do
    2    wrong command line
    70   a bug in tscale-fed; the traceback is kept in a file that the sentence names
    130  stopped by Ctrl+C

`--debug` lets the traceback through instead. Nothing heavy is imported before the command is known and its flags are right.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BUG = 70
EXIT_INTERRUPTED = 130

COMMANDS = {
    "train": "train without a swarm, on one or more devices, from a run file",
    "data": "turn text into token shards, look at them",
    "tokenizer": "make a tokenizer from text, look at one",
    "model": "look at a model; check this machine against a golden file",
    "generate": "let a model go on with a text",
    "bench": "measure codec, links, joins and kernels on this machine",
    "demo": "a seed and two peers on this machine, learning real text",
}
"""Subcommands of `tscale`: module `tscale_fed.commands.<name>` with `add_parser(subparsers)` and `run(args) -> int`."""

SIMULATION = "sim"
"""`tscale-peer sim` simulates peers instead of being one."""
DOCTOR = "doctor"
"""`tscale-peer doctor` looks at this machine and its network."""

_SYSTEM_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space, or put the home elsewhere with --home DIR",
    errno.EDQUOT: "your disk quota is used up: free some space, or put the home elsewhere with --home DIR",
    errno.EADDRINUSE: "the port is in use: another program (or another peer) listens there; choose one with --listen HOST:PORT",
    errno.EADDRNOTAVAIL: "this machine does not have that address: check --listen",
    errno.EMFILE: "too many open files: raise the limit with `ulimit -n 4096`",
    errno.EROFS: "the file system is read-only: put the home elsewhere with --home DIR",
    errno.EACCES: "permission denied",
    errno.ENOENT: "no such file or directory",
    errno.EISDIR: "this is a directory, not a file",
    errno.ENOTDIR: "a part of this path is a file, not a directory",
}


def peer_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tscale-peer`."""
    from tscale_fed.commands import peer_arguments

    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == [SIMULATION]:
        from tscale_fed.commands.sim import sim_parser

        return run_command("tscale-peer sim", "sim", sim_parser().parse_args(words[1:]))
    if words[:1] == [DOCTOR]:
        from tscale_fed.commands.doctor import doctor_parser

        arguments = doctor_parser().parse_args(words[1:])
        peer_arguments.resolve_home(arguments)
        return run_command("tscale-peer doctor", "doctor", arguments)
    parser = peer_arguments.peer_parser()
    arguments = parser.parse_args(words)
    peer_arguments.check_peer_arguments(parser, arguments)
    peer_arguments.resolve_home(arguments)
    return run_command("tscale-peer", "peer", arguments)


def status_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tscale-status`."""
    from tscale_fed.commands.peer_arguments import resolve_home
    from tscale_fed.commands.status import status_parser

    arguments = status_parser().parse_args(argv)
    resolve_home(arguments)
    return run_command("tscale-status", "status", arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tscale`."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = tscale_parser(words).parse_args(words)
    return run_command("tscale", arguments.subcommand, arguments)


def tscale_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of `tscale`. Only the command that `words` ask for is imported; the others are listed with their one line."""
    from tscale_fed import __version__

    description = "Tools around tscale-peer: train alone, prepare data, check, measure."
    parser = argparse.ArgumentParser(prog="tscale", description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tscale {__version__}")
    parser.add_argument("--debug", action="store_true", help="show Python tracebacks")
    subparsers = parser.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)
    wanted = next((word for word in words if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name == wanted:
            importlib.import_module(f"tscale_fed.commands.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def run_command(program: str, command: str, arguments: argparse.Namespace) -> int:
    """Import the command, run it, and turn whatever it raises into one sentence and an exit code."""
    try:
        return int(importlib.import_module(f"tscale_fed.commands.{command}").run(arguments))
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): nobody is left to tell, and the interpreter must not try to flush either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if getattr(arguments, "debug", False):
            raise
        sentence = sentence_of(error)
        print(f"{program}: {sentence or _bug(error)}", file=sys.stderr)
        return EXIT_FAILED if sentence else EXIT_BUG


def sentence_of(error: BaseException) -> str | None:
    """One sentence for an error that users can meet and mend; None if it is a bug. Of an exception group, the first leaf that has one."""
    from tscale_net.errors import Refused

    if isinstance(error, BaseExceptionGroup):
        return next((sentence for inner in error.exceptions if (sentence := sentence_of(inner))), None)
    if isinstance(error, Refused):
        return error.detail
    if isinstance(error, ModuleNotFoundError):
        return f"the Python package '{error.name}' is missing: install tscale-fed again with `pip install -e .` in its folder"
    if isinstance(error, OSError):
        return _system_sentence(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: use a smaller batch or model, or another --device"
    return None


def _system_sentence(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename is not None else ""
    return place + _SYSTEM_ERRORS.get(error.errno or 0, error.strerror or str(error))


def _bug(error: BaseException) -> str:
    """Keep the traceback in a file of the user's own, and name it."""
    import tempfile
    import traceback

    text = "".join(traceback.format_exception(error))
    first = str(error).splitlines()[0][:200] if str(error) else "no message"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="tscale-bug-", suffix=".txt", delete=False) as file:
            file.write(text)
    except OSError as failed:
        return f"a bug, {type(error).__name__}: {first} (its traceback could not be kept: {failed.strerror}; --debug shows it)"
    return f"a bug, {type(error).__name__}: {first}. Please report it with the traceback in {file.name}"
