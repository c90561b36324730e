"""Codes on a GPU from fp32 weights on the CPU, matrix by matrix: the weights never are on the GPU as a whole.

The same codes as `PackedWeights.pack` makes there, bit for bit; for whoever only reads (the scorer), while host_memory.py trains.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from tscale_fed.engine.host_pieces import build_pieces
from tscale_fed.engine.packed import PackedWeights
from tscale_fed.model.shape import ModelShape
from tscale_kernels import host_update
from tscale_kernels.dispatch import BackendName
from tscale_kernels.host_update import HostBackend
from tscale_kernels.place_codes import place_codes

SPARE_CORES = 2
"""Left to the thread that launches kernels and to the network."""
CONTAINER_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of processor time and the period in which they may be used, or "max"."""


@torch.no_grad()
def pack_from_host(
    flat: Tensor, shape: ModelShape, weights: PackedWeights, table: Tensor, host: HostBackend, backend: BackendName | None = None
) -> None:
    """flat: fp32 [parameters] on the CPU, contiguous. Writes `weights` and `table` (fp32 [embedding rows, E]) on the device."""
    for pieces in build_pieces(shape, weights, table).values():
        for piece in pieces:
            values = flat[piece.start : piece.stop]
            if piece.table is not None:
                piece.table.copy_(values.view(piece.rows, piece.columns))
                continue
            assert piece.matrix is not None
            codes = torch.empty(values.numel(), dtype=piece.matrix.codes.dtype)
            for number, segment in enumerate(piece.segments):
                part = slice(segment.start - piece.start, segment.stop - piece.start)
                squares = torch.empty(host_update.blocks(segment.elements), dtype=torch.float64)
                host_update.weight_squares_of(values[part], squares, host)
                unit = host_update.unit_of(squares, segment.elements, codes.dtype)
                host_update.encode_weights(values[part], unit, codes[part], host)
                piece.matrix.units[number] = unit
            place_codes(
                codes.to(table.device).view(piece.rows, piece.columns), row_map=piece.row_map, column_map=piece.column_map,
                codes=piece.matrix.codes, codes_t=piece.matrix.codes_t, backend=backend,
            )  # fmt: skip


def host_threads() -> int:
    """Threads of the host's work unless the caller says otherwise."""
    return max(1, usable_cores() - SPARE_CORES)


def usable_cores() -> int:
    """Processor cores that this process may use: its affinity, and the quota of its container if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CONTAINER_QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no file, or "max"
        return cores
