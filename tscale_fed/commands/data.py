"""`tscale data import` turns text into token shards; `tscale data info` shows and checks a data directory.

Progress goes to stderr, the result to stdout, so that `--json` can be piped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tscale_fed.data.manifest import DataManifest, SplitRecord

DEFAULT_HELD_OUT = 0.05


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe `tscale data` to argparse."""
    parser = subparsers.add_parser("data", help="turn text into token shards, look at them", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    importing = actions.add_parser("import", help="text files, folders or jsonl -> token shards", allow_abbrev=False)
    importing.add_argument("sources", nargs="+", metavar="SRC", help='file, folder, .jsonl with a "text" field, or builtin:demo')
    importing.add_argument("--tokenizer", default="bytes", metavar="NAME", help="bytes, gpt2 or a tokenizer.json (default: %(default)s)")
    importing.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    held_out_help = "part of the text kept for testing (default: %(default)s)"
    importing.add_argument("--held-out", type=float, default=DEFAULT_HELD_OUT, metavar="F", help=held_out_help)

    info = actions.add_parser("info", help="what is in a data directory", allow_abbrev=False)
    info.add_argument("directory", type=Path, metavar="DIR")
    info.add_argument("--verify", action="store_true", help="read every byte and check all hashes")
    for action in (importing, info):
        action.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run the action. Raises Refused, whose sentence `tscale` prints."""
    if args.action == "import":
        manifest, directory = _import(args), args.out
    else:
        manifest, directory = _info(args), args.directory
    facts = describe(manifest)
    if args.json:
        print(json.dumps({"directory": str(directory), **facts}))
    else:
        print(summary(directory, manifest, verified=args.action == "import" or args.verify))
    return 0


def _import(args: argparse.Namespace) -> DataManifest:
    from tscale_fed.console import Console
    from tscale_fed.data.importer import import_text
    from tscale_fed.data.tokenizer import load_tokenizer
    from tscale_net.ports import SystemClock

    clock = SystemClock()
    console = Console(sys.stderr, clock)
    try:
        return import_text(
            args.sources,
            load_tokenizer(args.tokenizer),
            args.out,
            args.held_out,
            lambda done_bytes, total_bytes, _rate: console.progress("reading", done_bytes, total_bytes),
            clock=clock,
        )
    finally:
        console.close()


def _info(args: argparse.Namespace) -> DataManifest:
    from tscale_fed.data.assemble import verify_directory
    from tscale_fed.data.manifest import read_manifest

    return verify_directory(args.directory) if args.verify else read_manifest(args.directory)


def describe(manifest: DataManifest) -> dict[str, Any]:
    """The figures of a manifest, for `--json`."""
    parts = {
        name: {"tokens": part.tokens, "text_bytes": part.text_bytes, "documents": part.documents, "shards": len(part.shards)}
        for name, part in (("train", manifest.train), ("test", manifest.test))
    }
    tokenizer = {"kind": manifest.tokenizer.kind, "hash": manifest.tokenizer.hash, "vocab": manifest.tokenizer.vocab}
    return {"hash": manifest.hash, "tokenizer": tokenizer, **parts, "bytes": sum(file.size for file in manifest.files())}


def summary(directory: Path, manifest: DataManifest, *, verified: bool) -> str:
    """Five lines for people."""
    from tscale_fed.units import bytes_text

    record = manifest.tokenizer
    lines = [
        f"{directory}: {bytes_text(sum(file.size for file in manifest.files()))} in {len(manifest.files())} files",
        f"  content    {manifest.hash}{'' if verified else '  (not checked; --verify reads everything)'}",
        f"  tokenizer  {record.kind} {record.hash[:12]}, vocabulary {record.vocab} with fragment start and document start",
        f"  training   {_part_text(manifest.train)}",
        f"  held out   {_part_text(manifest.test)}",
    ]
    return "\n".join(lines)


def _part_text(part: SplitRecord) -> str:
    from tscale_fed.units import bytes_text, count_text

    per_token = f", {part.text_bytes / part.tokens:.2f} bytes per token" if part.tokens else ""
    return f"{count_text(part.tokens)} tokens from {bytes_text(part.text_bytes)} of text in {count_text(part.documents)} runs{per_token}"
