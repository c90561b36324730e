"""The ablation: equal weights, optimizers that are what they say, the search of rates, a whole run at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tscale_fed.bench.ablation import search
from tscale_fed.bench.ablation_models import Stack, make_architecture
from tscale_fed.bench.ablation_optimizers import DECAY, make_stepper, orthogonalised
from tscale_fed.bench.ablation_run import Model, Plan
from tscale_fed.cli import main
from tscale_fed.model.shape import ModelShape
from tscale_kernels.testing import assert_close

CPU = torch.device("cpu")


@pytest.mark.parametrize("dims", ["e256h2d12w256", "e256h2d36w256", "e512h3d12"])
@pytest.mark.parametrize("name", ["plain", "wide"])
def test_layers_have_as_many_weights(name: str, dims: str) -> None:
    shape = ModelShape.parse(dims, vocab=97)
    sizes = [sum(stack.size for stack in make_architecture(each, shape, 16, 128, CPU, scaled=False).stacks if stack.kind == "matrix")
             for each in ("tscale", name)]  # fmt: skip
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_scaled_weights_make_the_same_model() -> None:
    shape = ModelShape.parse("e128h1d4w8", vocab=20)
    plan = Plan(shape, 2, 16, 1, 1, CPU)
    text = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(1))
    losses = [Model(f"plain/{optimizer}", 1, plan, torch.zeros(20)).loss(text, text) for optimizer in ("adamw", "rule")]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_a_token_sees_itself_but_not_the_next() -> None:
    plan = Plan(ModelShape.parse("e128h1d4w8", vocab=20), 1, 8, 1, 1, CPU)
    model = Model("plain/adamw", 1, plan, torch.zeros(20))
    generator = torch.Generator().manual_seed(1)
    for leaf in (leaf for stack in model._leaves[:4] for leaf in stack):
        leaf.data.normal_(0, 0.1, generator=generator)
    text = torch.zeros(1, 8, dtype=torch.int64)
    other = text.clone()
    other[0, 5] = 7
    with torch.no_grad():
        states = [model._model.state(model._leaves, each, model._layer) for each in (text, other)]
    assert torch.equal(states[0][:, :5], states[1][:, :5]) and not torch.equal(states[0][:, 6], states[1][:, 6])


def test_adamw_is_that_of_torch() -> None:
    stacks = [Stack("matrix", 2, 3, 4, "matrix", 1.0), Stack("embedding", 1, 5, 4, "rows", 1.0)]
    generator = torch.Generator().manual_seed(1)
    weights, gradient = torch.randn(44, generator=generator), torch.zeros(44)
    theirs = [weights[:24].clone().requires_grad_(), weights[24:].clone().requires_grad_()]
    groups = [{"params": [theirs[0]], "weight_decay": DECAY}, {"params": [theirs[1]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-10)
    ours = make_stepper("adamw", stacks, weights, gradient, decay=True, compiled=False)
    for _ in range(3):
        gradient.copy_(torch.randn(44, generator=generator) * 0.1)  # a norm below the limit
        theirs[0].grad, theirs[1].grad = gradient[:24].clone(), gradient[24:].clone()
        optimizer.step()
        ours.set_numbers(0.01)
        ours.run()
    assert_close("weights", weights, torch.cat([each.detach() for each in theirs]), 1e-5)


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 16)])
def test_muon_steps_are_nearly_orthogonal(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalised(matrices).float())
    assert values.min() > 0.5 and values.max() < 1.3


def test_search_goes_on_beyond_the_edge_and_stops() -> None:
    tried: list[float] = []

    def loss(rate: float) -> float:
        tried.append(rate)
        return (rate - 0.03) ** 2

    assert search((0.001, 0.002, 0.004), 5, loss) == 0.032
    assert tried == [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064]
    tried.clear()
    assert search((0.001, 0.002, 0.004), 1, loss) == 0.008 and len(tried) == 4


def test_whole_run_on_the_processor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "ablation.json"
    text.write_bytes(bytes(97 + (i * i + i // 7) % 23 for i in range(20_000)))
    sizes = ["--dims", "e128h1d2w8", "--fragments", "4", "--tokens", "8", "--steps", "2", "--extra-rates", "0", "--device", "cpu"]
    assert main(["bench", "ablation", "--text", str(text), "--rows", "tscale/rule", "plain/muon", *sizes, "--out", str(out)]) == 0
    runs = json.loads(out.read_text())["runs"]
    assert [(run["row"], run["seed"]) for run in runs] == [(row, seed) for row in ("tscale/rule", "plain/muon") for seed in (1, 1, 1, 2)]
    assert "rates tried" in capsys.readouterr().out
