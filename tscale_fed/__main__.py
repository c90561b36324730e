"""`python -m tscale_fed` is `tscale`: what torchrun starts with -m."""

import sys

from tscale_fed.cli import main

if __name__ == "__main__":
    sys.exit(main())
