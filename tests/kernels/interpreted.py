"""Runs cases in Triton's interpreter, on the CPU, against the reference: python tests/kernels/interpreted.py [MODULE ...] [--only WORDS]

Every case gets fresh numbers; the seed is printed, and --seed repeats a run. Exits with 1 if a case failed.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / room) for room in ("kernels", "net", "peers", ".")]

import interpreter_fix  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from case_protocol import TINY, Setting  # noqa: E402
from run_cases import check, found_modules, load_cases  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="cases modules (all)")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="cases whose name contains one of the words")
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    interpreter_fix.install()
    np.seterr(all="ignore")  # as on a GPU, a division by zero is no news
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    outcomes = []
    for name, build in load_cases(options.modules or found_modules(), options.only).items():
        outcomes.append(check(name, build, Setting(TINY, torch.device("cpu"), seed)))
        print(outcomes[-1].line(), flush=True)
    failed = [outcome for outcome in outcomes if outcome.verdict == "FAIL"]
    skipped = sum(outcome.verdict == "SKIP" for outcome in outcomes)
    print(f"{len(outcomes)} cases, {len(failed)} failed, {skipped} skipped, seed {seed}")
    return 1 if failed or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
