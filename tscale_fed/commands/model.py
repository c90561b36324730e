"""`tscale model`: look at a model's shape; check this implementation against a golden file.

Enters: `shape DIMS`, `conform FILE.npz`, or `info FILE.bin` (a checkpoint of the original). Leaves: a table on stdout and
an exit code: 0 conforms or read, 1 does not or the file cannot be used.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tscale_fed.model.constants import DEFAULT_NOISE_ROWS

DEFAULT_VOCAB = 50258
"""GPT-2's vocabulary and the fragment-start token: what the published parameter counts are for."""


def add_parser(subparsers: Any) -> None:
    """Describe the command to `tscale`'s parser."""
    parser = subparsers.add_parser("model", help="look at a model; check this machine against a golden file", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    conform = actions.add_parser("conform", help="compare predictions and updates with a golden file", allow_abbrev=False)
    conform.add_argument("file", type=Path, metavar="FILE.npz", help="printed by the original's reference, or of the same layout")
    info = actions.add_parser("info", help="what a checkpoint file of the original TScale holds", allow_abbrev=False)
    info.add_argument("file", type=Path, metavar="FILE.bin", help="eden_gpt_*.bin; no weights are loaded")
    shape = actions.add_parser("shape", help="sizes, layers and parameter count of a dims string", allow_abbrev=False)
    shape.add_argument("dims", metavar="DIMS", help="for example e256h2d36w256")
    vocab_help = "tokens, the fragment-start token included (default %(default)s)"
    shape.add_argument("--vocab", type=int, default=DEFAULT_VOCAB, metavar="N", help=vocab_help)
    noise_help = "embedding rows used as noise (default %(default)s)"
    shape.add_argument("--noise-rows", type=int, default=DEFAULT_NOISE_ROWS, metavar="N", help=noise_help)


def run(arguments: argparse.Namespace) -> int:
    """Raises Refused for a file or a dims string that cannot be used, OSError for one that cannot be read."""
    if arguments.action == "info":
        return _info(arguments.file)
    return _conform(arguments.file) if arguments.action == "conform" else _shape(arguments)


def _conform(path: Path) -> int:
    from tscale_fed.conform import check, report_lines
    from tscale_fed.golden import read_golden

    outcome = check(read_golden(path))
    for line in report_lines(outcome):
        print(line)
    return 0 if outcome.passed else 1


def _info(path: Path) -> int:
    from tscale_fed.export.original import read_original

    found = read_original(path)
    print(f"{path}: checkpoint of the original TScale, {found.parameters / 1e6:.3f}M parameters")
    print(f"state {found.width}, {found.heads} heads of 128, feed-forward multiple {found.ffn_multiple}, {len(found.layers)} layers")
    print(f"vocabulary {found.vocab}, {found.labels} embedding rows, flags {found.flags:#x}, fragments of {found.fragment_tokens} tokens")
    return 0


def _shape(arguments: argparse.Namespace) -> int:
    from itertools import groupby

    from tscale_fed.model.shape import ModelShape, ShapeError
    from tscale_net.errors import Refused

    try:
        shape = ModelShape.parse(arguments.dims, arguments.vocab, arguments.noise_rows)
    except ShapeError as error:
        raise Refused("bad-model-shape", str(error)) from error
    print(f"{shape.dims}: {shape.parameters / 1e6:.3f}M parameters with a vocabulary of {shape.vocab}")
    print(f"state {shape.width}, {shape.heads} heads of 128, feed-forward {shape.ffn_width}, {len(shape.layers())} layers:")
    print("  " + ", ".join(f"{len(list(group))} x width {width}" for width, group in groupby(sorted(w for w, _ in shape.layers()))))
    for name in ("embedding", "final"):
        rows, columns = next((r, c) for tensor, r, c in shape.tensors() if tensor == name)
        print(f"  {name:<9} {rows} x {columns} = {rows * columns / 1e6:.3f}M")
    layers = shape.parameters - (shape.embedding_rows + shape.vocab) * shape.width - shape.vocab
    print(f"  layers    {layers / 1e6:.3f}M, fixed output bias {shape.vocab / 1e6:.3f}M")
    return 0
