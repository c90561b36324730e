"""Cases of what a GPU does for weights in host memory: placing codes. Results are equal bit for bit."""

from __future__ import annotations

from functools import partial

import torch
from case_protocol import CODES, Case, Setting, rounded_up

from tscale_kernels import place_codes as op


def place_codes(
    setting: Setting, code: torch.dtype, rows: int = 0, row_map: bool = False, column_map: bool = False, transposed: bool = True
) -> Case:
    """rows 0: those of the joined projections; columns those of the combiner."""
    height, width = rows or 4 * setting.sizes.attention_width, setting.sizes.width
    if column_map:
        height, width = width, height
    source = setting.vector_codes(height, width, code)
    rows_at = setting.permutation(height) if row_map else None
    columns_at = setting.permutation(width) if column_map else None
    padded = rounded_up(height)
    outputs = {"codes": (padded, width)} | ({"codes_t": (width, padded)} if transposed else {})
    return Case(
        outputs=lambda: {name: setting.poisoned(shape, code) for name, shape in outputs.items()},
        run=lambda out, backend: op.place_codes(
            source, row_map=rows_at, column_map=columns_at, codes=out["codes"], codes_t=out.get("codes_t"), backend=backend
        ),
        limits=dict.fromkeys(outputs, 0),
        bytes_moved=(2 + transposed) * height * width * code.itemsize,
    )


CASES = (
    {f"place_codes {name}": partial(place_codes, code=code) for name, code in CODES.items()}
    | {f"place_codes rows {name}": partial(place_codes, code=code, row_map=True) for name, code in CODES.items()}
    | {f"place_codes columns {name}": partial(place_codes, code=code, column_map=True) for name, code in CODES.items()}
    | {"place_codes both int8": partial(place_codes, code=torch.int8, row_map=True, column_map=True)}
    | {"place_codes padded int8": partial(place_codes, code=torch.int8, rows=150, row_map=True)}
    | {"place_codes padded, not transposed int8": partial(place_codes, code=torch.int8, rows=257, transposed=False)}
)
