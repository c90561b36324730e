"""Builds an engine from a shape and weights alone, without data files or a trainer: what benches, checks and the assembly share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tscale_fed.engine.engine import Engine
from tscale_fed.engine.place import make_engine
from tscale_fed.engine.precision import choose_precision
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import OptimizerSettings
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
    optimizer_place: str = "device",
    graphs: bool | None = None,
    backend: BackendName | None = None,
    say: Callable[[str], None] = lambda line: None,
    engine_type: Callable[..., Engine] = Engine,
) -> Engine:
    """An engine at step 0 with its optimizer: `engine.step(StepBatch.make(shape, text, target), rate)` is one whole step.

    weights    fp32 [parameters], any device, copied; `model.init.initialise(shape, seed)` makes start weights
    bias2      fp32 [V] fixed output bias in base-2 units (`model.loss.unigram_bias`); None = zero
    precision  auto, bfloat16, int8 or fp8; attention: auto, bfloat16, int8 or fp8
    fragments  of a whole step, each of `tokens` tokens; micro_batch = how many at once, 0 = chosen from free memory
    doc_start_token  token that attention does not look across; None = documents are not told apart
    plan       auto, keep (saved states of all layers) or recompute (only layer inputs)
    stream     dtype of the state and of its gradient between layers: float32, or bfloat16 for measuring
    optimizer_place  device, host (weights and momentum in the machine's memory: host_memory.py) or auto
    graphs     CUDA graphs; None = on CUDA
    backend    forces "ref" or "triton" for all operations (the interpreter: "triton" on the CPU with TRITON_INTERPRET=1)
    say        gets one line about the memory plan, and one if memory runs out
    engine_type  makes the engine on the device: another one where several processes train together (tscale_fed/parallel)

    The engine has `.parameters.flat` [P] (the live weights: change them in place between steps), `.optimizer`, `.plan` (a `MemoryPlan`;
    str() is its sentence), `.step(batch, rate) -> loss sum in nats`, and `.accumulate(batch) -> loss sum`, which only makes the gradient.
    Raises Refused: "no-device" for a precision that the device lacks, "out-of-memory".
    """
    where = torch.device(device)
    chosen, _ = choose_precision(where, precision, attention)
    return make_engine(
        shape, weights, bias2, device=where, precision=chosen, settings=settings or OptimizerSettings(), fragments=fragments, tokens=tokens,
        doc_start_token=doc_start_token, optimizer_memory=optimizer_place, micro_batch=micro_batch, plan=plan, stream=stream, graphs=graphs,
        backend=backend, say=say, engine_type=engine_type,
    )  # fmt: skip
