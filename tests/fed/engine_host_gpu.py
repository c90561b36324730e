"""CPU offload on a GPU, checked and timed: python tests/fed/engine_host_gpu.py [--dims e1280h20d42w1024] [--fragments 24] [--tokens 1024]

Checks on a small model, against the engine that keeps everything on the device: losses, the gradient that arrives (bit for bit), and that
the codes on the GPU are those that packing the masters there would make (bit for bit), also after weights were changed between steps and
with several micro-batches. Then times the model given: step, GPU memory, bytes of host memory per weight, how long the step waited for the
host, how busy the host was, and the speed of a copy in host memory and over the bus in the same run. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    _ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(_ROOT / room) for room in ("kernels", "net", "peers", "tests/fed", ".")]

import torch

from tscale_fed.engine.build import build_engine
from tscale_fed.engine.engine import Engine
from tscale_fed.engine.host_engine import HostEngine
from tscale_fed.engine.interface import StepBatch
from tscale_fed.engine.packed import PackedWeights
from tscale_fed.model.init import initialise
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import OptimizerSettings

SMALL = ModelShape.parse("e256h2d6w64", vocab=300, noise_rows=4)
RATE = 0.01


def batch_of(shape: ModelShape, fragments: int, tokens: int, step: int) -> StepBatch:
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(shape.vocab, (fragments, tokens + 1), generator=generator)
    return StepBatch.make(shape, text[:, :-1].contiguous(), text[:, 1:].contiguous(), noise=generator, step=step, seed=step)


def engine_for(shape: ModelShape, fragments: int, tokens: int, place: str, **options: object) -> Engine:
    return build_engine(
        shape, initialise(shape, 1), device="cuda", precision="int8", fragments=fragments, tokens=tokens, optimizer_place=place,
        settings=OptimizerSettings(warmup_batches=0), **options,  # type: ignore[arg-type]
    )  # fmt: skip


def check_small() -> list[str]:
    faults = []
    for name, options in {
        "graphs": {},
        "no graphs": {"graphs": False},
        "three micro-batches, recomputed": {"micro_batch": 4, "plan": "recompute"},
    }.items():
        on_device, in_host = (engine_for(SMALL, 12, 64, place, **options) for place in ("device", "host"))
        assert isinstance(in_host, HostEngine)
        for step in range(8):
            batch = batch_of(SMALL, 12, 64, step)
            want, got = on_device.step(batch, RATE), in_host.step(batch, RATE)
            if abs(want - got) > 0.01 * abs(want):
                faults.append(f"{name}: loss of step {step} is {got}, on the device {want}")
            faults += [f"{name}, step {step}: {fault}" for fault in wrong_codes(in_host)]
            if step % 3 == 2:
                for engine in (on_device, in_host):
                    engine.weights[1000:90000].mul_(1.01)
        on_device.weights.copy_(in_host.weights)
        batch = batch_of(SMALL, 12, 64, 99)
        on_device.accumulate(batch)
        in_host.accumulate(batch)
        want_gradient, got_gradient = on_device.parameters.flat_grad.bfloat16().cpu(), in_host.parameters.flat_grad
        different = int((want_gradient.view(torch.int16) != got_gradient.view(torch.int16)).sum())
        error = float((want_gradient.float() - got_gradient.float()).norm() / want_gradient.float().norm())
        if error > (0.01 if "micro" in name else 0.0):
            faults.append(f"{name}: {different} of {got_gradient.numel()} gradients differ, relative error {error:.2e}")
        print(f"{name}: {len(faults)} faults, gradients differ in {different} of {got_gradient.numel()}, error {error:.1e}", flush=True)
        in_host.close()
    return faults


def wrong_codes(engine: HostEngine) -> list[str]:
    """What packing the masters on the GPU makes, beside what the host made and sent."""
    torch.cuda.synchronize()
    weights = engine._weights
    packed = PackedWeights(engine.parameters.shape, weights.final.codes.dtype, engine.device, transposed=True)
    packed.pack(engine.weights.to(engine.device))
    faults = [name for name in ("_codes", "_codes_t", "units") if not torch.equal(getattr(packed, name), getattr(weights, name))]
    table = engine.parameters.views["embedding"].to(engine.device)
    return faults + ([] if torch.equal(table, engine._table) else ["embedding"])


def copy_speeds() -> str:
    """GB/s of a copy in host memory (read and written), and of the bus in both directions."""
    size = 1 << 28
    a, b = torch.zeros(size), torch.zeros(size)
    b.copy_(a)
    start = time.perf_counter()
    b.copy_(a)
    memory = 8 * size / (time.perf_counter() - start) / 1e9
    pinned, device = torch.zeros(size // 4).pin_memory(), torch.zeros(size // 4, device="cuda")
    speeds = []
    for source, target in ((pinned, device), (device, pinned)):
        target.copy_(source)
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        speeds.append(size / (time.perf_counter() - start) / 1e9)
    return f"host copy {memory:.0f} GB/s, bus {speeds[0]:.0f} to the GPU, {speeds[1]:.0f} from it"


def measure(shape: ModelShape, fragments: int, tokens: int, steps: int, **options: object) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine = engine_for(shape, fragments, tokens, "host", say=print, **options)
    assert isinstance(engine, HostEngine)
    waited, busy = Stopwatch(engine._memory, "finish"), Stopwatch(engine._memory, "_take")
    batches = [batch_of(shape, fragments, tokens, step) for step in range(4)]
    times = []
    for step in range(steps + 3):
        start = time.perf_counter()
        engine.step(batches[step % 4]._replace(step=step, seed=step), RATE)
        times.append(time.perf_counter() - start)
        if step == 2:
            times.clear()
            waited.seconds = busy.seconds = 0.0
    free, total = torch.cuda.mem_get_info()
    middle = sorted(times)[len(times) // 2]
    parameters = shape.trained_parameters
    print(
        f"{torch.cuda.get_device_name()}: step {middle * 1e3:.0f} ms (of {len(times)}), {fragments * tokens / middle:.0f} tokens/s, "
        f"{parameters * fragments * tokens / middle / 1e12:.1f} TParams/s with the embedding"
    )
    print(
        f"waited for the host {waited.seconds / len(times) * 1e3:.0f} ms per step; its thread was busy or waiting for copies "
        f"{busy.seconds / len(times) * 1e3:.0f} ms"
    )
    print(
        f"GPU: tensors at most {torch.cuda.max_memory_allocated() / 1e9:.2f} GB, held {torch.cuda.max_memory_reserved() / 1e9:.2f} GB, "
        f"whole card {(total - free) / 1e9:.2f} GB; host {engine._masters.memory.bytes / parameters:.2f} bytes per weight"
    )
    engine.close()


class Stopwatch:
    """Seconds spent in a method of one object."""

    def __init__(self, owner: object, name: str) -> None:
        self.seconds = 0.0
        original = getattr(owner, name)

        def timed(*arguments: object) -> object:
            start = time.perf_counter()
            try:
                return original(*arguments)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(owner, name, timed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", default="e1280h20d42w1024")
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--fragments", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--plan", default="recompute")
    parser.add_argument("--check-only", action="store_true")
    options = parser.parse_args()
    faults = check_small()
    print("\n".join(faults) or "checked")
    if not options.check_only:
        print(copy_speeds())
        measure(ModelShape.parse(options.dims, options.vocab), options.fragments, options.tokens, options.steps, plan=options.plan)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
