"""Builds an engine from a shape and weights alone, without data files or a trainer: what benches, checks and the assembly share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tscale_fed.engine.engine import Engine
from tscale_fed.engine.precision import choose_precision
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import Optimizer, OptimizerSettings
from tscale_kernels.dispatch import BackendName


def build_engine(
    shape: ModelShape,
    weights: Tensor,
    bias2: Tensor | None = None,
    *,
    device: torch.device | str = "cuda",
    precision: str = "auto",
    attention: str = "auto",
    fragments: int,
    tokens: int,
    doc_start_token: int | None = None,
    settings: OptimizerSettings | None = None,
    micro_batch: int = 0,
    plan: str = "auto",
    stream: torch.dtype = torch.float32,
    graphs: bool | None = None,
    backend: BackendName | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Engine:
    """An engine at step 0 with its optimizer: `engine.step(StepBatch.make(shape, text, target), rate)` is one whole step.

    weights    fp32 [parameters], any device, copied; `model.init.initialise(shape, seed)` makes start weights
    bias2      fp32 [V] fixed output bias in base-2 units (`model.loss.unigram_bias`); None = zero
    precision  auto, bfloat16, int8 or fp8; attention: auto, bfloat16, int8 or fp8
    fragments  of a whole step, each of `tokens` tokens; micro_batch = how many at once, 0 = chosen from free memory
    doc_start_token  token that attention does not look across; None = documents are not told apart
    plan       auto, keep (saved states of all layers) or recompute (only layer inputs)
    stream     dtype of the state and of its gradient between layers: float32, or bfloat16 for measuring
    graphs     CUDA graphs; None = on CUDA
    backend    forces "ref" or "triton" for all operations (the interpreter: "triton" on the CPU with TRITON_INTERPRET=1)
    say        gets one line about the memory plan, and one if memory runs out

    The engine has `.parameters.flat` [P] (the live weights: change them in place between steps), `.optimizer`, `.plan` (a `MemoryPlan`;
    str() is its sentence), `.step(batch, rate) -> loss sum in nats`, and `.accumulate(batch) -> loss sum`, which only makes the gradient.
    Raises Refused: "no-device" for a precision that the device lacks, "out-of-memory".
    """
    where = torch.device(device)
    chosen, _ = choose_precision(where, precision, attention)
    parameters = Parameters(shape, where).load(weights)
    optimizer = Optimizer(parameters, settings or OptimizerSettings())
    return Engine(
        parameters, optimizer, bias2, precision=chosen, fragments=fragments, tokens=tokens, doc_start_token=doc_start_token,
        micro_batch=micro_batch, plan=plan, stream=stream, graphs=graphs, backend=backend, say=say,
    )  # fmt: skip
