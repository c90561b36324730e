"""Cases in the interpreter as a card without descriptors runs them: python tests/kernels/interpreted_pointers.py cases_matmul

Operands go through pointers and configurations are those of sm_89, so that what runs below sm_90 is checked too. Options as interpreted.py.
"""

from __future__ import annotations

import sys

import interpreted  # sets TRITON_INTERPRET and the path
import torch

from tscale_kernels import tiles


def capability(device: torch.device) -> tuple[int, int]:
    return (8, 9)


if __name__ == "__main__":
    tiles.capability = capability
    sys.exit(interpreted.main())
