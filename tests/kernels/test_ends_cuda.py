"""The ends of the model on a GPU: the same bits at every run, and when a CUDA graph replays them. Skipped where there is none."""

from collections.abc import Callable

import pytest
import torch
from case_protocol import SMALL, Case, Setting, Tensors
from cases_ends import CASES

from tscale_kernels.testing import assert_same_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NAMES = [name for name in CASES if "e4m3" not in name]


def same(name: str, case: Case, got: Tensors, want: Tensors) -> None:
    for output in case.limits:
        assert_same_bits(f"{name}: {output}", got[output], want[output])


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_give_the_same_bits(name: str) -> None:
    case = CASES[name](Setting(SMALL, torch.device("cuda"), 1))
    first, second = case.outputs(), case.outputs()
    case.run(first, "triton")
    case.run(second, "triton")
    same(name, case, second, first)


@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_replays_the_same_bits(name: str) -> None:
    case = CASES[name](Setting(SMALL, torch.device("cuda"), 2))
    want, out, fresh = case.outputs(), case.outputs(), case.outputs()
    case.run(want, "triton")
    graph = captured(lambda: case.run(out, "triton"))
    for output, start in fresh.items():
        out[output].copy_(start)
    graph.replay()
    torch.cuda.synchronize()
    same(name, case, out, want)


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph
