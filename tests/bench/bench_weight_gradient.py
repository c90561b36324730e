"""How exactly 8-bit products give weight gradients, on gradients recorded from a model that has learnt for a while.

    PYTHONPATH=.:net:kernels:peers python tests/bench/bench_weight_gradient.py --text FILE --device cuda --dims e256h2d36w256 --steps 200

Trains the plain torch model on bytes of FILE, then records inputs and output gradients of a few layers in one step and prints, for every
matrix product, the relative error (1e-4) of its weight gradient against fp64 for each way to bring tokens of unequal gradients into 8 bits:
    split own     rows weighted by 1/sqrt(largest of the same gradient), one scale per channel: needs another pass over the gradient
    split above   weights from the state's gradient above the layer, not below the mean: known before, no other pass (what the engine does)
    sort 128      the original: tokens sorted by scale, one scale per 128 tokens, scaled inside the product; 1024: likewise
    channel       one scale per channel, tokens as they are
    e4m3          both sides fp8, one scale
    row bound     every token with its own scale (no product can do that; the error of the codes alone)
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from tscale_fed.model import layer as layer_module
from tscale_fed.model.forward import Model
from tscale_fed.model.init import initialise
from tscale_fed.model.loss import unigram_bias
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import Optimizer, OptimizerSettings

PEAK = 127.0
FLOOR = 1e-30


def dithered(values: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.rand(values.shape, device=values.device, generator=generator)
    return (values + noise).floor().clamp(-128, 127)


def channels(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """[M, N] rounded to 8 bits with one scale per column; with dither if a generator is given."""
    unit = (x.abs().amax(0) / PEAK).clamp_min(FLOOR)
    scaled = x / unit
    return (scaled.round() if generator is None else dithered(scaled, generator)) * unit


def split(g: Tensor, x: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
    root = scale.sqrt()[:, None]
    return channels(g / root, generator).double().T @ channels(x * root, None).double()


def sorted_groups(g: Tensor, x: Tensor, group: int, generator: torch.Generator) -> Tensor:
    order = g.abs().amax(1).argsort()
    total = torch.zeros(g.shape[1], x.shape[1], dtype=torch.float64, device=g.device)
    for rows in order.split(group):
        unit = (g[rows].abs().max() / PEAK).clamp_min(FLOOR)
        total += dithered(g[rows] / unit, generator).double().T @ x[rows].double() * unit.double()
    return total


def fp8(x: Tensor) -> Tensor:
    unit = (x.abs().max() / 448.0).clamp_min(FLOOR)
    return (x / unit).to(torch.float8_e4m3fn).float() * unit


def errors(g: Tensor, x: Tensor, above: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Gradient g [M, N], input x [M, K] (unit RMS), `above` [M] largest state gradient of each token."""
    codes = (x * 24).round().clamp(-128, 127) / 24
    exact = g.double().T @ codes.double()
    own = g.abs().amax(1).clamp_min(FLOOR)
    floored = above.clamp_min(float(above.mean()) + FLOOR)
    rows = dithered(g / own[:, None] * PEAK, generator) * own[:, None] / PEAK
    got = {
        "split own": split(g, codes, own.clamp_min(float(own.max()) * 1e-6), generator),
        "split above": split(g, codes, floored, generator),
        "sort 128": sorted_groups(g, codes, 128, generator),
        "sort 1024": sorted_groups(g, codes, 1024, generator),
        "channel": channels(g, generator).double().T @ codes.double(),
        "e4m3": fp8(g).double().T @ fp8(codes).double(),
        "row bound": rows.double().T @ codes.double(),
    }
    size = float(torch.linalg.vector_norm(exact))
    return {name: 1e4 * float(torch.linalg.vector_norm(value - exact)) / size if size else math.nan for name, value in got.items()}


def record(model: Model, text: Tensor, target: Tensor, wanted: set[int]) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, gradient [M, N], input [M, K], largest state gradient above [M]) of the products of the wanted layers."""
    found: list[dict[str, Tensor | str]] = []
    above: dict[int, Tensor] = {}
    at = {"layer": -1}
    plain_linear, plain_layer = layer_module.linear, model._layer

    def linear(x: Tensor, weight: Tensor, compute: torch.dtype) -> Tensor:
        out = plain_linear(x, weight, compute)
        if at["layer"] in wanted:
            name = f"layer {at['layer']} {tuple(weight.shape)}"
            entry: dict[str, Tensor | str] = {"name": name, "x": x.detach(), "layer": str(at["layer"])}
            out.register_hook(lambda grad: entry.__setitem__("g", grad.detach()))
            found.append(entry)
        return out

    def layer(*arguments: object) -> Tensor:
        at["layer"] += 1
        index = at["layer"]
        out = plain_layer(*arguments)  # type: ignore[arg-type]
        if index in wanted:
            out.register_hook(lambda grad: above.__setitem__(index, grad.detach().flatten(0, 1).abs().amax(1).float()))
        return out

    layer_module.linear, model._layer = linear, layer  # type: ignore[assignment]
    try:
        model.loss(text, target)[0].backward()
    finally:
        layer_module.linear, model._layer = plain_linear, plain_layer
    return [
        (str(e["name"]), e["g"].flatten(0, -2).float(), e["x"].flatten(0, -2).float(), above[int(str(e["layer"]))])  # type: ignore[union-attr]
        for e in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dims", default="e256h2d36w256")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fragments", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rate", type=float, default=0.01)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    corpus = torch.frombuffer(bytearray(arguments.text.read_bytes()), dtype=torch.uint8)
    shape = ModelShape.parse(arguments.dims, 256)
    parameters = Parameters(shape, device).load(initialise(shape, 1))
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Model(shape, parameters, unigram_bias(torch.bincount(corpus.int(), minlength=256)), compute_dtype=compute)
    optimizer = Optimizer(parameters, OptimizerSettings(rate=arguments.rate))
    generator = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(corpus) - arguments.tokens - 1, (arguments.fragments,), generator=generator)
        rows = corpus[starts[:, None] + torch.arange(arguments.tokens + 1)[None, :]].long()
        target = rows[:, 1:].clone()
        target[:, 0] = -1
        return rows[:, :-1].to(device), target.to(device)

    for step in range(arguments.steps):
        loss, count = model.loss(*batch())
        loss.backward()
        optimizer.step(arguments.rate * min(1.0, (step + 1) / 50))
    trained = f"{arguments.steps} steps of {arguments.fragments} x {arguments.tokens}"
    print(f"{arguments.dims} after {trained}: loss {float(loss.detach()) / int(count):.4f}")
    depth = len(shape.layers())
    noise = torch.Generator(device=device).manual_seed(2)
    names = ("split own", "split above", "sort 128", "sort 1024", "channel", "e4m3", "row bound")
    print(f"{'relative error, 1e-4':34}" + "".join(f"{name:>13}" for name in names))
    sums: dict[str, list[float]] = {name: [] for name in names}
    for name, g, x, above in record(model, *batch(), {0, 1, depth // 3, depth // 2, depth - 2, depth - 1}):
        row = errors(g, x, above, noise)
        for key in names:
            sums[key].append(row[key])
        print(f"{name:34}" + "".join(f"{row[key]:13.0f}" for key in names))
    for what, function in (("mean", lambda v: sum(v) / len(v)), ("worst", max)):
        print(f"{what:34}" + "".join(f"{function([x for x in sums[key] if x == x]):13.0f}" for key in names))


if __name__ == "__main__":
    main()
