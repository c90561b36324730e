"""`tscale bench kernels` for a machine that has torch and triton only: python tests/bench/run_kernels.py [its options]"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / room) for room in ("net", "kernels", "peers"))]

from tscale_fed.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["bench", "kernels", *sys.argv[1:]]))
