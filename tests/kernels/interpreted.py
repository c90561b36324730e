"""Runs cases in Triton's interpreter, on the CPU, against the reference: python tests/kernels/interpreted.py [MODULE ...] [--only WORDS]

Every case gets fresh numbers; the seed is printed, and --seed repeats a run. Exits with 1 if a case failed.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / room) for room in ("kernels", "net", "peers", ".")]

import interpreter_fix  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from case_protocol import TINY, Setting  # noqa: E402
from run_cases import check, found_modules, load_cases, quick_cases, run_parts, usable_processes  # noqa: E402


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="cases modules (all)")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="cases whose name contains one of the words")
    parser.add_argument("--quick", action="store_true", help="of every op one case with each code dtype, and of attention the odd shapes")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--processes", type=int, default=usable_processes())
    parser.add_argument("--part", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_part(options: argparse.Namespace, part: int, seed: int) -> Iterator[str]:
    """Cases number part, part + processes, ..., one line each."""
    torch.set_num_threads(1)
    interpreter_fix.install()
    np.seterr(all="ignore")  # as on a GPU, a division by zero is no news
    cases = load_cases(options.modules or found_modules(), options.only)
    for name, build in list((quick_cases(cases) if options.quick else cases).items())[part :: options.processes]:
        yield check(name, build, Setting(TINY, torch.device("cpu"), seed)).line()


def main() -> int:
    options = options_of()
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    if options.part is not None:
        for line in run_part(options, options.part, seed):
            print(line, flush=True)
        return 0
    own_part = run_part(options, 0, seed)
    lines, ended = run_parts(sys.argv[0], options.processes, [*sys.argv[1:], "--seed", str(seed)], own_part)
    print("\n".join(lines))
    failed, skipped = (sum(line.startswith(verdict) for line in lines) for verdict in ("FAIL", "SKIP"))
    print(f"{len(lines)} cases, {failed} failed, {skipped} skipped, seed {seed}{'' if ended else '; a process died'}")
    return 0 if lines and ended and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
