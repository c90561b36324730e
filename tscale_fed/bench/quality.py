"""`tscale bench quality`: what the model learns in a given number of tokens, beside the original TScale and beside bf16.

Enters: a text, runs in words (see quality_settings.py). Leaves: tables, a JSON file, exit code 0 if both schedules reach their goal.

    tscale bench quality --text dictionary.txt.xz                                   int8 with fp8 attention and bf16, both schedules
    tscale bench quality --text FILE --run "int8/fp8 qtail rate=0.014 ema=0.99" --run "compiled qtail rate=0.014 ema=0.99"

All runs of a seed see the same start weights, fragments and noise. The model is the one that the original was measured with:
e256h2d36w256, 64 fragments of 256 bytes per step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tscale_fed.bench.compiled_layer import LocalWay
    from tscale_fed.bench.quality_learners import Place
    from tscale_fed.bench.quality_run import Trained
    from tscale_fed.bench.quality_text import QualityText

RUNS = ("compiled qtail ema=0.99", "int8/fp8 qtail ema=0.99", "compiled qconst ema=0.99,0.998", "int8/fp8 qconst ema=0.99,0.998")
"""Unless others are named."""
DIMS, FRAGMENTS, TOKENS = "e256h2d36w256", 64, 256


def add_parser(subparsers: Any) -> None:
    """Describe the bench."""
    from tscale_fed.bench.options import count, positive

    parser = subparsers.add_parser("quality", help="loss after so many tokens, beside the original and bf16", allow_abbrev=False)
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to learn, plain, .xz or .gz (without: says how to build it)")
    run_help = f"a run in words, may be given often: ARITHMETIC SCHEDULE [NAME=VALUE ...] (default: {'; '.join(RUNS)})"
    parser.add_argument("--run", action="append", metavar="WORDS", help=run_help)
    parser.add_argument("--also", default="", metavar="WORDS", help="words added to every run, for example 'noise=32 seed=2'")
    parser.add_argument("--seconds", type=positive, default=240.0, metavar="S", help="of training per run at most (default: 240)")
    parser.add_argument("--dims", default=DIMS, help="TScale dims string (default: %(default)s)")
    parser.add_argument("--fragments", type=count, default=FRAGMENTS, metavar="N", help="per step (default: %(default)s)")
    parser.add_argument("--tokens", type=count, default=TOKENS, metavar="N", help="per fragment (default: %(default)s)")
    parser.add_argument("--local", choices=("flex", "blocks"), help="local attention of the compiled runs (default: flex on a GPU)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file (default: docs/bench/quality.json)")


def run(arguments: argparse.Namespace) -> int:
    """Train run by run, write after every run, print. Raises Refused for texts and words that cannot be used, OSError for files."""
    from tscale_fed.bench.machine import result_path
    from tscale_fed.bench.progress import Progress
    from tscale_fed.bench.quality_run import train
    from tscale_fed.bench.quality_settings import Setting
    from tscale_fed.bench.quality_table import goal_met, table_lines
    from tscale_fed.bench.step_measure import forget
    from tscale_net.errors import Refused

    progress = Progress()
    settings = [Setting.parse(f"{words} {arguments.also}") for words in arguments.run or RUNS]
    place, text = _place_and_text(arguments)
    progress.say(f"{len(text.ids):,} bytes, {text.vocab - 1} distinct, {text.train_bytes:,} to train on; sha256 {text.sha256[:12]}")
    if not text.is_dictionary:
        progress.say("not the text of the original: its figures and the goal do not apply")
    path = result_path("quality", arguments.out)
    runs: list[Trained] = []
    for setting in settings:
        forget()
        runs.append(train(setting, place, text, arguments.seconds, progress.say))
        _write(path, place, text, runs)
    if all(run.failure for run in runs):
        raise Refused("bad-bench", f"no run could be made: {runs[0].failure}")
    print("\n".join(["", *table_lines(runs), f"written: {path}"]))
    return 0 if text.is_dictionary and goal_met(runs) else 1


def _place_and_text(arguments: argparse.Namespace) -> tuple[Place, QualityText]:
    import torch

    from tscale_fed.bench.options import shape_of
    from tscale_fed.bench.quality_learners import Place
    from tscale_fed.bench.quality_text import DICTIONARY_RECIPE, QualityText
    from tscale_net.errors import Refused

    if arguments.text is None:
        raise Refused("no-text", f"--text FILE is missing; {DICTIONARY_RECIPE}")
    device = torch.device(arguments.device)
    text = QualityText.open(arguments.text, torch.device("cpu"))
    shape_of(arguments.dims, text.vocab)
    local: LocalWay = arguments.local or ("flex" if device.type == "cuda" else "blocks")
    return Place(arguments.dims, text.vocab, arguments.fragments, arguments.tokens, device, local), text


def _write(path: Path, place: Place, text: QualityText, runs: list[Trained]) -> None:
    """The result file as far as the runs have come."""
    import dataclasses
    import time

    from tscale_fed.bench.machine import command_text, machine_facts, write_result
    from tscale_fed.bench.quality_table import GOALS, ORIGINAL, goal_met

    values = {
        "bench": "quality",
        "command": command_text(),
        "machine": machine_facts(str(place.device), time.time()),
        "text": {"sha256": text.sha256, "bytes": len(text.ids), "train_bytes": text.train_bytes, "vocab": text.vocab},
        "sizes": {"dims": place.dims, "fragments": place.fragments, "tokens": place.tokens},
        "goals": GOALS,
        "goal_met": text.is_dictionary and goal_met(runs),
        "original": ORIGINAL,
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    write_result(path, values)
