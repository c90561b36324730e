"""Twenty steps of a small model, the same numbers everywhere.

    python tests/fed/engine_twenty_steps.py cpu|interpreter|cuda [PRECISION [ATTENTION]]

Prints one JSON object: the 20 mean losses (nats per token), and where and how they were made. The losses of the plain-torch operations
(cpu), of the Triton kernels in the interpreter and on a GPU agree to 1e-3. PRECISION: bfloat16, int8 (default), fp8, or float32 for the
reference.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Literal

Where = Literal["cpu", "interpreter", "cuda"]
_ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.path[:0] = [str(_ROOT / room) for room in ("kernels", "net", "peers", ".")]
    sys.path.append(str(_ROOT / "tests" / "kernels"))
    if sys.argv[1:2] == ["interpreter"]:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch  # noqa: E402

from tscale_fed.engine.build import build_engine  # noqa: E402
from tscale_fed.engine.interface import StepBatch, TrainingEngine  # noqa: E402
from tscale_fed.engine.reference import ReferenceEngine  # noqa: E402
from tscale_fed.model.forward import Model  # noqa: E402
from tscale_fed.model.init import initialise  # noqa: E402
from tscale_fed.model.parameters import Parameters  # noqa: E402
from tscale_fed.model.shape import ModelShape  # noqa: E402
from tscale_fed.optimizer.rule import Optimizer, OptimizerSettings  # noqa: E402

STEPS = 20
VOCAB = 60
DOC_START = 3
FRAGMENTS, TOKENS = 4, 32
"""128 rows, no padding: the interpreter needs half a minute per step all the same."""
RATE = 0.005


def shape() -> ModelShape:
    """All kinds of layers: two of width 1, one that is wider than the fragments (64), one that is not (20)."""
    return ModelShape.parse("e128h1d4w20", VOCAB, noise_rows=4)


def text_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A language that can be learned: tokens follow each other by a rule, with some surprises. (text, target) int64 [B, T]."""
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(VOCAB, (FRAGMENTS, TOKENS + 1), generator=generator)
    surprise = torch.rand(text.shape, generator=generator) < 0.1
    for t in range(1, TOKENS + 1):
        text[:, t] = torch.where(surprise[:, t], text[:, t], (5 * text[:, t - 1] + 7) % VOCAB)
    target = text[:, 1:].clone()
    target[:, 0] = -1
    return text[:, :-1].contiguous(), target


def batch_of(step: int) -> StepBatch:
    text, target = text_of(step)
    generator = torch.Generator().manual_seed(step)
    keep = torch.rand(text.shape, generator=generator) < 0.9
    return StepBatch.make(shape(), text, target, token_keep=keep, noise=generator, step=step, seed=77 + step)


def make(where: Where, precision: str = "int8", attention: str = "auto", micro_batch: int = 0, plan: str = "keep") -> TrainingEngine:
    """The engine at step 0, or with precision float32 the reference."""
    weights, settings = initialise(shape(), 5), OptimizerSettings(rate=RATE, warmup_batches=0)
    if precision == "float32":
        parameters = Parameters(shape(), "cuda" if where == "cuda" else "cpu").load(weights)
        return ReferenceEngine(
            Model(shape(), parameters), Optimizer(parameters, settings), fragments=micro_batch or FRAGMENTS, doc_start_token=DOC_START
        )
    return build_engine(
        shape(), weights, device="cuda" if where == "cuda" else "cpu", precision=precision, attention=attention, fragments=FRAGMENTS,
        tokens=TOKENS, doc_start_token=DOC_START, settings=settings, micro_batch=micro_batch, plan=plan,
        backend="triton" if where == "interpreter" else None,
    )  # fmt: skip


def losses(engine: TrainingEngine, steps: int = STEPS) -> list[float]:
    """Mean loss of each step, nats per token."""
    results = []
    for step in range(steps):
        batch = batch_of(step)
        results.append(engine.step(batch, RATE) / batch.targets)
    return results


def main() -> int:
    where = sys.argv[1] if len(sys.argv) > 1 else ""
    if where not in ("cpu", "interpreter", "cuda") or len(sys.argv) > 4:
        print(__doc__, file=sys.stderr)
        return 2
    if where == "interpreter":
        import interpreter_fix

        interpreter_fix.install()
    precision, attention = [*sys.argv[2:], "int8", "auto"][0], [*sys.argv[3:], "auto"][0]
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if where == "cuda" else "cpu"
    result = losses(make(where, precision, attention))  # type: ignore[arg-type]
    print(json.dumps({"where": where, "device": device, "precision": precision, "attention": attention, "losses": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
