"""`python -m tscale_fed.bench NAME ...` is `tscale bench NAME ...`, for an environment where the scripts are not installed."""

from __future__ import annotations

import sys

from tscale_fed.cli import main

# Worker processes import this module again, under another name.
if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
