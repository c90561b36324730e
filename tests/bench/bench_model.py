"""Training speed of the model against a plain GPT of the same parameter count, in the same run.

    python tests/bench/bench_model.py                                    one CPU thread, sizes of the demo
    python tests/bench/bench_model.py --device cuda --dims e512h3d50w1024 --tokens 1024 --fragments 16 --dtype bf16

Both train: forward, backward, optimizer step (TScale's rule; AdamW for the GPT). Their steps alternate, so that whatever else the machine
does falls on both; the best of the repetitions is shown, with the median behind it. The GPT is pre-norm blocks of width E with causal
attention in heads of 64, untied embedding and head; as many blocks as come nearest, and the feed-forward width that makes the layer
parameters equal. `GFLOP/s` counts 6 per layer and head parameter and token; attention scores are not included.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "net")]

from tscale_fed.model.forward import Model  # noqa: E402
from tscale_fed.model.init import initialise  # noqa: E402
from tscale_fed.model.parameters import Parameters  # noqa: E402
from tscale_fed.model.shape import ModelShape  # noqa: E402
from tscale_fed.optimizer.rule import Optimizer, OptimizerSettings  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARMUP_STEPS = 3
DOC_START = 0


class GptBlock(torch.nn.Module):
    """Pre-norm attention and feed-forward, no biases."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)])
        self.projection = torch.nn.Linear(width, 3 * width, bias=False)
        self.output = torch.nn.Linear(width, width, bias=False)
        self.up = torch.nn.Linear(width, hidden, bias=False)
        self.down = torch.nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = self.projection(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(joined[0], joined[1], joined[2], is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class Gpt(torch.nn.Module):
    def __init__(self, width: int, blocks: int, hidden: int, vocab: int, tokens: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, width)
        self.position = torch.nn.Parameter(torch.randn(tokens, width))
        self.blocks = torch.nn.Sequential(*(GptBlock(width, max(1, width // 64), hidden) for _ in range(blocks)))
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, vocab, bias=False)

    def forward(self, text: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.norm(self.blocks(self.embedding(text) + self.position)))
        return functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=-1, reduction="mean")


def alternate(steps: list[Callable[[], None]], repetitions: int, device: torch.device) -> list[list[float]]:
    """Seconds of every repetition of every step, the steps taking turns, the device finished each time."""
    times: list[list[float]] = [[] for _ in steps]
    for index in range(WARMUP_STEPS + repetitions):
        for step, taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if index >= WARMUP_STEPS:
                taken.append(time.perf_counter() - start)
    return times


def peak_gib(step: Callable[[], None], device: torch.device) -> float | None:
    """Device memory that one step needs on top of what is held already; None on the CPU."""
    if device.type != "cuda":
        return None
    step()
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return (torch.cuda.max_memory_allocated(device) - held) / 2**30


def tscale_step(shape: ModelShape, text: torch.Tensor, target: torch.Tensor, options: argparse.Namespace) -> Callable[[], None]:
    parameters = Parameters(shape, options.device).load(initialise(shape, 1))
    model = Model(shape, parameters, compute_dtype=DTYPES[options.dtype])
    if options.compile:
        model.compile()
    optimizer = Optimizer(parameters, OptimizerSettings())
    noise = torch.Generator().manual_seed(1)
    doc_start = DOC_START if options.documents else None

    def step() -> None:
        model.loss(text, target, doc_start_token=doc_start, noise=noise)[0].backward()
        optimizer.step(1e-3)

    return step


def gpt_step(gpt: Gpt, text: torch.Tensor, target: torch.Tensor, options: argparse.Namespace) -> Callable[[], None]:
    gpt.to(options.device)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-3, fused=True)
    dtype = DTYPES[options.dtype]
    if options.compile:
        for block in gpt.blocks:
            block.compile()

    def step() -> None:
        with torch.autocast(options.device.type, dtype, enabled=dtype != torch.float32):
            loss = gpt(text, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def line(name: str, layers: int, head: int, positions: int, taken: list[float], memory_gib: float | None) -> str:
    best, middle = min(taken), statistics.median(taken)
    memory = f"  activations {memory_gib:.2f} GiB" if memory_gib is not None else ""
    speed = f"{best * 1e3:8.1f} ms/step (median {middle * 1e3:.1f})  {positions / best:9.0f} tokens/s"
    return f"  {name:<16}{layers / 1e6:9.3f}M in layers  {speed}  {6 * (layers + head) * positions / best / 1e9:8.1f} GFLOP/s{memory}"


def compare(dims: str, options: argparse.Namespace) -> None:
    """Measure one size and print its lines."""
    shape = ModelShape.parse(dims, options.vocab, 32)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(options.vocab, (options.fragments, options.tokens), generator=generator)
    target = text.roll(-1, 1)
    target[:, 0] = -1
    text, target = text.to(options.device), target.to(options.device)
    width, head = shape.width, shape.vocab * shape.width
    layers = shape.trained_parameters - head - shape.embedding_rows * width
    blocks = max(1, round(layers / (12 * width**2)))
    hidden = max(8, round((layers / blocks - 4 * width**2) / (2 * width) / 8) * 8)
    print(f"{shape.dims}, {options.fragments} x {options.tokens} tokens, vocabulary {options.vocab}, {options.dtype} on {options.device}")
    gpt = Gpt(width, blocks, hidden, options.vocab, options.tokens)
    counts = {"TScale": layers, f"GPT, {blocks} blocks": blocks * (4 * width**2 + 2 * width * hidden)}
    steps = [tscale_step(shape, text, target, options), gpt_step(gpt, text, target, options)]
    times = alternate(steps, options.repetitions, options.device)
    for (name, count), step, taken in zip(counts.items(), steps, times, strict=True):
        print(line(name, count, head, options.fragments * options.tokens, taken, peak_gib(step, options.device)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", nargs="+", default=["e128h1d4w128", "e128h2d6w128", "e256h1d4w128"])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--fragments", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=257, help="257 = bytes and the fragment-start token")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--documents", action="store_true", help="attention does not cross document starts (token 0)")
    parser.add_argument("--compile", action="store_true", help="torch.compile both, layer by layer")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dims in options.dims:
        compare(dims, options)


if __name__ == "__main__":
    main()
