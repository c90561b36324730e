"""Tokens per second of decoding, beside the same answer made by one forward pass over the whole text per token.

    python tests/bench/bench_decode.py [--dims e256h2d36w256] [--vocab 258] [--prompt 256] [--batch 1 8] [--device cpu]

Prints, for every weight format and batch size: milliseconds until the first token, ms per step, tokens/s, times the baseline. Weights are
random. Nothing else should run beside it: threads that wait for a core cost more than the work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from tscale_fed.inference.decoder import Decoder
from tscale_fed.inference.weights import FORMATS, prepare_weights
from tscale_fed.model.forward import Model
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape


def seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Of one call, after a warm-up."""
    work()
    _wait(device)
    begun = time.perf_counter()
    for _ in range(times):
        work()
    _wait(device)
    return (time.perf_counter() - begun) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", default="e256h2d36w256")
    parser.add_argument("--vocab", type=int, default=258)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    shape = ModelShape.parse(arguments.dims, arguments.vocab, 32)
    flat = 0.5 * torch.randn(shape.trained_parameters, generator=torch.Generator().manual_seed(1))
    prompt = torch.randint(arguments.vocab - 2, (arguments.prompt,), generator=torch.Generator().manual_seed(2))
    model = Model(shape, Parameters(shape, device).load(flat), torch.zeros(shape.vocab))
    naive = seconds(lambda: model.logits(prompt[None].to(device)), 3, device)
    print(f"{shape.dims}, {shape.trained_parameters / 1e6:.1f} million weights, {device}, {torch.get_num_threads()} threads")
    print(f"whole forward pass per token (baseline): {naive * 1e3:.0f} ms, {1 / naive:.1f} tokens/s")
    for kind in FORMATS:
        weights = prepare_weights(shape, flat, torch.zeros(shape.vocab), device, kind)
        for batch in arguments.batch:
            decoder = Decoder(weights, batch, None)
            first = seconds(lambda: decoder.prefill(0, prompt), 3, device)  # noqa: B023
            for slot in range(1, batch):
                decoder.prefill(slot, prompt)
            step = seconds(lambda: decoder.step(torch.zeros(batch, dtype=torch.int64)), arguments.steps, device)  # noqa: B023
            read = weights.bytes_per_step / step / 1e9
            line = f"{kind:<9} batch {batch:>2}: first token {first * 1e3:6.0f} ms, step {step * 1e3:6.1f} ms, {batch / step:7.0f} tokens/s"
            print(f"{line}, {batch / step * naive:.1f}x, weights read at {read:.1f} GB/s")


if __name__ == "__main__":
    main()
