"""Speed of the optimizer step in host memory: GB/s beside a copy of the same run, C and torch, per pass and together.

    python tests/bench/bench_host_update.py [--threads N] [--params 33554432] [--dims e1280h20d42] [--json FILE]

Matrices have the shapes of a layer of the model. Bytes: the update moves 18 per parameter (weights and momentum in and out, gradient in),
the codes 5, a whole step of a matrix 23 (the weights' second reading may come from the cache). The last line scales the step to the model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / room) for room in ("net", "kernels", "peers"))]

from tscale_fed.model.shape import ModelShape  # noqa: E402
from tscale_kernels import host_update, limits  # noqa: E402

REPEATS = 7


def best_s(work: Callable[[], object]) -> float:
    """Shortest of several runs: the machine may be shared."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def copy_gb_per_s(params: int) -> float:
    """torch's copy of fp32, bytes read and written."""
    source, target = torch.zeros(params), torch.zeros(params)
    return 8 * params / best_s(lambda: target.copy_(source)) / 1e9


def step_costs(sizes: list[int], host: host_update.HostBackend, code: torch.dtype) -> dict[str, float]:
    """Seconds of all matrices: update alone, codes alone, both by matrix, and of a further micro-batch's addition."""
    total = sum(sizes)
    weights, momentum = torch.randn(total), torch.zeros(total)
    gradient, part = torch.randn(total).bfloat16(), torch.randn(total).bfloat16()
    codes, multipliers = torch.zeros(total, dtype=code), torch.tensor([-1.0])
    scalars = host_update.HostScalars.of(1e-3, 0.95, 10.0)
    spans = [slice(at, at + size) for at, size in zip(_starts(sizes), sizes, strict=True)]
    squares = [torch.zeros(host_update.blocks(size), dtype=torch.float64) for size in sizes]

    def update() -> None:
        for span, sums in zip(spans, squares, strict=True):
            host_update.update(
                weights[span], momentum[span], gradient[span], multipliers=multipliers, scalars=scalars, weight_squares=sums, host=host
            )

    def encode() -> None:
        for span, sums in zip(spans, squares, strict=True):
            unit = host_update.unit_of(sums, sums.numel(), code)
            host_update.encode_weights(weights[span], unit, codes[span], host)

    def step() -> None:
        for span, sums in zip(spans, squares, strict=True):
            host_update.update(
                weights[span], momentum[span], gradient[span], multipliers=multipliers, scalars=scalars, weight_squares=sums, host=host
            )
            host_update.encode_weights(weights[span], host_update.unit_of(sums, sums.numel(), code), codes[span], host)

    def add() -> None:
        for span in spans:
            host_update.add_gradient(part[span], gradient[span], host)

    return {"update": best_s(update), "codes": best_s(encode), "update and codes": best_s(step), "add a micro-batch": best_s(add)}


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:index]) for index in range(len(sizes))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--params", type=int, default=1 << 25, help="at least so many, in whole layers")
    parser.add_argument("--dims", default="e1280h20d42")
    parser.add_argument("--code", choices=("int8", "float8_e4m3fn", "bfloat16"), default="int8")
    parser.add_argument("--blocks", nargs="*", type=int, default=[], help="sizes of the torch version's blocks to compare (elements)")
    parser.add_argument("--json", default=None, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = ModelShape.parse(options.dims, vocab=50257)
    layer = [rows * columns for name, rows, columns in shape.tensors() if name.startswith("layers.0.")]
    sizes = layer * -(-options.params // sum(layer))
    total, bytes_each = sum(sizes), {"update": 18, "codes": 5, "update and codes": 23, "add a micro-batch": 6}
    print(f"{options.threads} threads, {total} parameters in {len(sizes)} matrices of {options.dims}; best of {REPEATS}")
    results: dict[str, dict[str, float]] = {"copy": {"gb_per_s": copy_gb_per_s(total)}}
    print(f"  {'torch copy':42s} {results['copy']['gb_per_s']:7.1f} GB/s   baseline")
    native = host_update.choose_host(options.threads)
    print(f"  C: {native.reason}")
    rounds = [("C", native, limits.host_block_elements)] if native.name == "native" else []
    plain = host_update.choose_host(options.threads, forced="torch")
    rounds += [(f"torch, blocks of {size}", plain, size) for size in options.blocks or [limits.host_block_elements]]
    for name, host, block in rounds:
        limits.host_block_elements = block
        results[name] = step_costs(sizes, host, getattr(torch, options.code))
        for part, seconds in results[name].items():
            speed = bytes_each[part] * total / seconds / 1e9
            print(f"  {name + ': ' + part:42s} {speed:7.1f} GB/s   {seconds / total * 1e9:6.3f} ns per parameter")
    for name, _, _ in rounds:
        whole = results[name]["update and codes"] / total * shape.trained_parameters
        print(f"{name}: {whole * 1e3:.0f} ms for the {shape.trained_parameters / 1e9:.2f}e9 parameters of {options.dims}")
    if options.json is not None:
        Path(options.json).write_text(json.dumps({"threads": options.threads, "parameters": total, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
